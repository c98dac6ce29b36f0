"""What examples/benchmarks/speed.py measures: a file each, with TITLE, NOTE, UNIT and measure."""
