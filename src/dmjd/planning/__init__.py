"""The cost of a training run, before it begins. Nothing here knows settings.

gpus        devices by their data sheets (gpus.yaml), and the device of this machine
work        floating-point operations and memory of a step, counted without computing it
trial       real steps on the device of this machine, for comparison
estimate    hours, memory, communication and storage of a run, from the above
script      the same run as a script for torchrun or SLURM
"""
