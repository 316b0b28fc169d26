"""The microbenchmarks: every op against plain torch, against other libraries, and against what it cannot avoid.

`subjects/` says what is timed, `peers/` how other libraries do the same, `timing` how, `limits` what must move;
`suite` makes the rows, `record` keeps them, `compare` sets two runs side by side, `tables` and `figure` show them.
"""
