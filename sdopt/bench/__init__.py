"""The benchmark harness: sdopt beside PyTorch and beside its peers, in one run, with the parity of what was timed.

cases      what is measured: model, size, steps, guidance, batch
timing     timed calls, interleaved A B A B with the order turned round each time
stats      medians, ratios pair by pair, bootstrap intervals
sides      what is measured on: sdopt (here), diffusers (`baseline`), any program that speaks `protocol` (`peers`)
cold       fresh processes: start, import, load, first picture, and their peak memory
machine    processor, versions, GPU: what a record has to tell
record     the JSON file, with a versioned schema; raw timings, nothing derived
compare    two records, and a gate
report     tables and plots, from records alone; overview: one small table and one plot of them
"""
