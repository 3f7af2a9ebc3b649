"""Every launcher under one name, for `launch.kernels_for`."""
