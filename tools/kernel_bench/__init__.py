"""The parts of `triptych bench kernels`: what is timed, what stands beside it, one side's process, the
picture."""
