"""A network of ours in the formats of other programs, each file compared with the network before it gets its name.

network         what a file of ours holds, and the images and tolerances that exports are compared by
timm_file       weights that timm loads
hub_folder      a folder for timm, for transformers and for the Hugging Face hub, with a model card
onnx_graph      a graph for ONNX Runtime and its kin; needs the extra `onnx`
torch_program   a program of torch.export
"""
