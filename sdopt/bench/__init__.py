"""The benchmark harness: it measures sdopt beside PyTorch and peers in one run, with the parity of what was timed.

Measuring:

cases      what is measured: model, size, steps, guidance, batch
harness    measures one case on every side
sides      what a side offers, and sdopt as a side
built      sdopt on engines that `sdopt build` made
baseline   diffusers on PyTorch as a side
peers      other programs as sides, and cold starts in fresh processes
protocol   the messages between the harness and other programs
child      a side of this package as such a program
timing     timed calls; the sides take turns
machine    what a record says about its machine: processor, versions, GPU

Tuning (its parts are listed in `tune`):

tune       the settings of a bundle that are worth their time on this machine

Evaluating:

record     the JSON file of a run, with a versioned schema: raw timings
stats      medians, ratios of pairs, bootstrap intervals
compare    two records, and whether the second is slower than allowed
report     a page of tables and plots from records
tables     the tables of one result
overview   one small table and one plot of all results
curves     cost against steps, pixels or images
svg        plots of bars and curves
"""
