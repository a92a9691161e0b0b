"""The pipeline that proves the matrix, cell by cell; run as ``python -m ci``, not in the wheel."""
