"""From files on disk to parameters in memory."""
