"""The Triton kernels, one file each: imported when one of them is about to run, never before."""
