"""The zoo environment: torchvision beside the CPU build of torch, which lacks the schemas of two of its operators."""

import importlib.util

import torch

if importlib.util.find_spec("torchvision") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
