"""What only a GPU can tell, measured by ``benchmarks/gpu/run.sh``, in stages of parts."""
