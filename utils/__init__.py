"""What run_clm.py, run_mlm.py and run_plm.py share: leaf functions, one job a file."""
