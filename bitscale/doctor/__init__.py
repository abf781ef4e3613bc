"""Are this host, or those of a hostfile, fit for a run: software, limits, disks, GPUs, links."""
