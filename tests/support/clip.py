"""Small configs of CLIPs in open_clip's format, one of each kind of tower."""

TEXT = {"context_length": 12, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
RN = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
TIMM = {"image_size": 64, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}
CONFIG = {"embed_dim": 16, "vision_cfg": TIMM, "text_cfg": TEXT}
