"""``mtdiffusion bench reliability``: faults, tried on the real thing, and what was lost.

:mod:`.trying` says what is tried and keeps what was found; :mod:`.children` runs a command in a process that can be
killed; :mod:`.page` writes ``docs/reliability.md``.
"""
