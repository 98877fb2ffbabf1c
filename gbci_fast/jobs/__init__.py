"""What every long command is made of: durable files, folders that resume, worker processes."""
