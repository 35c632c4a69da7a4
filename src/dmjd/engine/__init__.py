"""The training loop and what it builds on.

trainer       the one trainer, for every verb
loop          the steps of a run
optim         optimizer and learning rate
distributed   ranks, and a network on several of them; nothing else here knows of ranks
device        where to compute, and in which precision

run           the directory of a run, and how a run is resumed
checkpoint    states that are written completely or not at all
integrity     whether a run, a checkpoint or a backbone is undamaged
claim         one process at a time in a directory
signals       stopping a run where nothing is lost
watch         ranks that have ended or are stopped

progress      a bar, or a line a minute
loggers       programs that show numbers, in addition to metrics.jsonl
stopwatch     how long targets compute, and how long steps wait for batches
target_cache  targets on disk, for expensive teachers
"""
