"""What a training run will cost, before it begins. Nothing here knows settings.

gpus        what data sheets say of devices (gpus.yaml), and the device of this machine
work        floating-point operations and memory of a step, counted without computing it
trial       real steps on the device of this machine, to compare with
estimate    hours, memory, communication and storage of a run, from all of that
script      the same run as a script for torchrun or SLURM
"""
