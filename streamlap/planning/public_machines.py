"""Public machines by name, in the form of a machine file. Figures of processors are from data sheets: peak rates of dense
products, float16 and bfloat16 with sums in float32, float64 on tensor cores where there are some.

A GPU's sheet says nothing of the machine around it: `HOST` stands for that, and a file may put other figures in its place.
"""

from __future__ import annotations

from typing import Any

Table = dict[str, Any]

NVME: Table = {"read": "5GB", "write": "3GB"}
"""A PCIe 4 drive once its cache is full."""
DESKTOP: Table = {"cores": 8, "float32": "1T", "float64": "0.5T"}
"""8 cores at 4 GHz with AVX2: 16 operations in float64 a core and cycle."""
HOST: Table = {"ram": "64GiB", "disk": NVME, "cpu": DESKTOP}

PCIE_3_16, PCIE_4_8, PCIE_4_16, PCIE_5_16 = "15.8GB", "15.8GB", "31.5GB", "63GB"
"""Bytes a second in one direction, by generation and lanes."""


def _with_gpu(sheet: str, **gpu: str) -> Table:
    return HOST | {"gpu": gpu, "source": f"data sheet: {sheet}"}


def _cpu_only(sheet: str, ram: str, **cpu: Any) -> Table:
    return {"ram": ram, "disk": NVME, "cpu": cpu, "source": f"data sheet: {sheet}"}


PUBLIC: dict[str, Table] = {
    "rtx-3060-12gb": _with_gpu(
        "NVIDIA GeForce RTX 3060; Ampere GA10x whitepaper",
        memory="12GiB", pcie=PCIE_4_16, bfloat16="25.5T", float16="25.5T", float32="12.7T", float64="0.199T",
    ),
    "rtx-4060-8gb": _with_gpu(
        "NVIDIA GeForce RTX 4060; Ada whitepaper",
        memory="8GiB", pcie=PCIE_4_8, bfloat16="30.2T", float16="30.2T", float32="15.1T", float64="0.236T",
    ),
    "rtx-4090": _with_gpu(
        "NVIDIA Ada whitepaper, GeForce RTX 4090",
        memory="24GiB", pcie=PCIE_4_16, bfloat16="165.2T", float16="165.2T", float32="82.6T", float64="1.29T",
    ),
    "rtx-5090": _with_gpu(
        "NVIDIA RTX Blackwell whitepaper, GeForce RTX 5090",
        memory="32GiB", pcie=PCIE_5_16, bfloat16="209.5T", float16="209.5T", float32="104.8T", float64="1.64T",
    ),
    "t4": _with_gpu(  # 16 GB less what ECC takes; no bfloat16 in its hardware
        "NVIDIA T4 Tensor Core GPU; Turing whitepaper",
        memory="15GiB", pcie=PCIE_3_16, float16="65T", float32="8.1T", float64="0.253T",
    ),
    "l4": _with_gpu(  # 24 GB less what ECC takes
        "NVIDIA L4 Tensor Core GPU; Ada whitepaper",
        memory="22.5GiB", pcie=PCIE_4_16, bfloat16="121T", float16="121T", float32="30.3T", float64="0.473T",
    ),
    "a100-80gb": _with_gpu(
        "NVIDIA A100 80GB SXM",
        memory="80GiB", pcie=PCIE_4_16, bfloat16="312T", float16="312T", float32="19.5T", float64="19.5T",
    ),
    "h100-sxm": _with_gpu(
        "NVIDIA H100 SXM",
        memory="80GiB", pcie=PCIE_5_16, bfloat16="989T", float16="989T", float32="67T", float64="67T",
    ),
    "h200": _with_gpu(
        "NVIDIA H200 SXM",
        memory="141GB", pcie=PCIE_5_16, bfloat16="989T", float16="989T", float32="67T", float64="67T",
    ),
    "ryzen-9-7950x": _cpu_only(
        "AMD Ryzen 9 7950X, base clock; Zen 4 optimization guide",
        "64GiB", cores=16, bfloat16="4.6T", float32="2.3T", float64="1.15T",
    ),
    "epyc-9654": _cpu_only(
        "AMD EPYC 9654, base clock; Zen 4 optimization guide",
        "384GiB", cores=96, bfloat16="14.7T", float32="7.37T", float64="3.69T",
    ),
}  # fmt: skip
