"""Fits the constants of csrc/cpu again: thresholds between paths, and sizes of blocks.

    python -m benchmarks.fit                           the list: constant, value, what it trades, what decides it
    python -m benchmarks.fit kMaxIdle                  times its candidates beside the present value
    python -m benchmarks.fit paths.cpp:kMaxPixels      where several files have the name
    python -m benchmarks.fit kMaxIdle --values 1 1.5   others in place of the list's candidates

Each candidate is a library of its own in a process of its own, and the processes are timed in turns. The first build
compiles everything, each other one what depends on the constant's file; what was built is kept in --folder. A ratio is
a time as a multiple of that with the present value, a geometric mean over the constant's workload. Whatever else the
machine does meanwhile is measured too.

Constants interact: one is fitted while the others stay, so after a change fit those again that share its workload.
Nothing here needs a GPU, or measures one: `gradaug tune` writes a card's own table.
"""
