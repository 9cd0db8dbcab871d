"""Where the nodes of a file stand in the model that it was made from, as far as its names tell."""

from __future__ import annotations

import ast

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
"""Under which PyTorch writes the modules around an operator."""


def place_of(node: ir.Node) -> str:
    """The path of the module that an operator ran in, or its own name where nothing tells."""
    scopes = node.metadata_props.get(SCOPES)
    if scopes is not None:
        try:
            names = [name for name in ast.literal_eval(scopes)[:-1] if name]
            return str(names[-1]) if names else ""
        except (SyntaxError, TypeError, ValueError):
            pass
    name = node.name or next((value.name for value in node.outputs if value.name), None) or node.op_type
    parts: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if parts and part.startswith(f"{parts[-1]}."):  # PyTorch repeats the names of containers
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts) or ("" if name.startswith("/") else name)
