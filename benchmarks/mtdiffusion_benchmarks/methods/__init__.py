"""The methods we ship: one module each, registered as a third party's would be."""
