"""The commands `tq` (eval, bench, plan) and `tq-check`."""
