"""Networks for dense tasks, around any backbone; they need the extra `dense`.

segmenter   UPerNet
detector    Faster R-CNN, or Mask R-CNN
around      what both do with the backbone inside: make its maps, tell its parameters from the heads'
"""
