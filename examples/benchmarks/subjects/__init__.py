"""What examples/benchmarks/speed.py measures, a file each: TITLE, NOTE, UNIT, FIGURE, measure."""
