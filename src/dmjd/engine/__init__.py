"""The training loop and what it stands on.

trainer       the one way to train, for every verb
loop          step by step, in plain sight
optim         optimizer and learning rate
distributed   ranks, and a network on several of them; nothing else here knows of these
device        where to compute, and in which precision

run           the directory of a run, and how one is taken up again
checkpoint    states that are there whole or not at all
integrity     whether what is in a run or a file is whole
claim         one process at a time in a directory
signals       ends where nothing is lost
watch         ranks that are gone or stopped

progress      a bar, or a line a minute
loggers       programs that show numbers beside metrics.jsonl
stopwatch     how long targets compute, and how long steps wait
target_cache  targets on disk, for expensive teachers
"""
