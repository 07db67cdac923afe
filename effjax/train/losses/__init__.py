"""What training minimizes, one loss a file; the file name is the key."""
