"""Every setting of every verb: its type, its default, its help text and the rules between settings.

rules        what single settings must keep to; settings as YAML
load         defaults < preset < file < flags
common       groups that several verbs share
pretrain     sections of `dmjd pretrain`; what `--preset auto` chooses of them is `auto`
downstream   settings of the verbs that start from a backbone
doctor, export, plan, predict, prepare, search   of the verbs of these names
"""
