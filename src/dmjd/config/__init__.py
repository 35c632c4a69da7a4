"""Every setting of every verb: its type, its default, its help text and the rules between settings.

rules        checks of single settings; settings as YAML
load         defaults < preset < file < flags
common       groups that several verbs share
pretrain     sections of `dmjd pretrain`
auto         the sizes and lengths that `--preset auto` chooses for it
downstream   settings of the verbs that start from a backbone
doctor, export, plan, predict, prepare, search   settings of the verbs of these names
"""
