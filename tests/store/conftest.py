"""What is not collected here."""

# Run by hand: it needs s3fs and moto, whose dependencies do not fit beside those of the other tests.
collect_ignore = ["s3_on_loopback.py"]
