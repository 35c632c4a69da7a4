"""Every setting of every verb: its type, its default, its help text and the rules between settings.

rules        what single settings must keep to; settings as YAML
common       groups that several verbs share
pretrain     sections of `dmjd pretrain`
downstream   settings of the verbs that start from a backbone
"""
