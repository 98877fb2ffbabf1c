"""Building blocks of long commands: durable files, resumable job folders, worker processes."""
