"""The fitted constants of csrc/cpu, and the numbers beside them that were not fitted, with the reason.

A workload is convolutions as in `gradaug info --conv`, linear layers "N,C,O", batch norms on NHWC ("norm") and on
contiguous images ("planes"), and max poolings of 3x3 with stride 2. Channels that are no multiple of 16 are those of
sub-networks. Sizes of blocks are bounded by caches, so another processor may have other best values.
"""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

Number = int | float


class Of(NamedTuple):
    """What constants have in common.

    file: a path in csrc/cpu, or a glob. workload: names of WORKLOADS. accuracy: a value must also be exact: its error
    at most twice PyTorch's in the 2-norm. The tests, which judge the largest error too, have the last word.
    """

    file: str
    workload: str
    stages: tuple[str, ...]
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    accuracy: bool = False

    @property
    def calls(self) -> list["Call"]:
        problems = [problem for name in self.workload.split(" + ") for problem in WORKLOADS[name]]
        return [Call(*call) for call in product(problems, self.stages, self.dtypes)]


class Call(NamedTuple):
    problem: str
    stage: str
    dtype: str


@dataclass(frozen=True)
class Constant:
    """A number that was fitted. trade: what it decides. pattern: finds it by its group, where it has no name."""

    of: Of
    name: str
    trade: str
    candidates: tuple[Number, ...]
    pattern: str | None = None


# ---- workloads

SHAPES = ("8,64,112,112", "8,238,56,56", "8,1024,14,14", "8,2048,7,7", "32,160,32,32", "16,892,7,7")
WORKLOADS = {
    "dense": (  # 3x3 of stride 1: ResNet-50, WRN-28-10
        "conv 8,64,56,56,64,3,1,1",
        "conv 8,119,28,28,119,3,1,1",
        "conv 8,256,14,14,256,3,1,1",
        "conv 8,476,7,7,476,3,1,1",
        "conv 32,160,32,32,160,3,1,1",
        "conv 32,298,16,16,298,3,1,1",
        "conv 32,640,8,8,640,3,1,1",
    ),
    "close": (  # between whose tiles the estimate decides: few channels, or tiles that images leave half empty
        *(f"conv 8,{c},28,28,{c},3,1,1" for c in (16, 24, 32, 48, 64, 96, 128)),
        *(f"conv 8,{c},10,10,{c},3,1,1" for c in (32, 64, 128)),
        *(f"conv 8,{c},7,7,{c},3,1,1" for c in (64, 128, 256)),
    ),
    "shallow": tuple(f"conv 8,{c},28,28,64,3,1,1" for c in (24, 32, 40, 48, 58, 64, 80, 96, 128)),
    "large_weights": tuple(f"conv {n},512,7,7,1024,3,1,1" for n in (4, 8, 16, 32, 64)),
    "products": (  # neither dense nor of few pixels
        "conv 8,64,56,56,256,1",
        "conv 8,238,56,56,60,1",
        "conv 8,512,28,28,128,1",
        "conv 8,238,14,14,952,1",
        "conv 16,40,28,28,120,1",
        "conv 8,256,56,56,512,1,2",
        "conv 8,128,56,56,128,3,2,1",
        "conv 8,119,28,28,119,3,2,1",
        "conv 8,3,224,224,64,7,2,3",
    ),
    "few_pixels": tuple(f"conv {n},512,7,7,256,1" for n in (1, 4, 8, 12, 16, 24, 32, 48)),
    "few_copied": tuple(f"conv {n},512,14,14,512,1,2" for n in (1, 4, 8, 10, 12, 16, 24)),
    "few_copied_taps": tuple(f"conv {n},64,14,14,512,3,2,1" for n in (1, 2, 4, 6, 8, 12)),
    "columns": tuple(f"linear 64,1024,{out}" for out in (64, 72, 96, 112, 120, 128, 200, 224, 240, 256)),
    "many_units": tuple(f"linear {rows},1024,1024" for rows in (256, 512, 1024, 1536, 2048, 3072)),
    "long_panels": tuple(f"linear 32,{depth},512" for depth in (2048, 4096, 6144, 8192, 12288)),
    "few_rows": tuple(f"linear16 {rows},2048,1000" for rows in (1, 2, 4, 8, 12, 16, 24, 32, 64)),
    "linears": ("linear 8,2048,1000", "linear 16,892,1190", "linear 16,1280,1000", "linear 256,512,256"),
    "unequal": tuple(
        f"conv 8,{c},14,14,{out},1" for c, out in ((58, 230), (230, 58), (115, 460), (250, 250), (461, 461))
    ),
    "first": ("conv 8,3,224,224,64,7,2,3", *(f"conv 8,{c},112,112,32,3,2,1" for c in (1, 2, 3, 4, 6, 8))),
    "depthwise": (  # MobileNetV3
        "conv 16,16,112,112,16,3,1,1,1,16",
        "conv 16,120,28,28,120,5,1,2,1,120",
        "conv 16,186,14,14,186,3,1,1,1,186",
        "conv 16,480,14,14,480,3,1,1,1,480",
        "conv 16,960,7,7,960,5,1,2,1,960",
    ),
    "grouped": tuple(f"conv 8,128,28,28,128,3,1,1,1,{128 // size}" for size in (2, 4, 8)),
    "strided_depthwise": tuple(f"conv 16,64,56,56,64,{k},2,{k // 2},1,64" for k in (3, 5, 7)),
    "norms": tuple(f"norm {shape}" for shape in SHAPES),
    "planes": tuple(f"planes {shape}" for shape in SHAPES),
    "narrow_norms": tuple(f"norm 8,{c},28,28" for c in (1, 3, 5, 8, 12, 15, 20, 23, 29, 40, 58)),
    "small_norms": tuple(
        f"{kind} {n},{c},7,7" for kind in ("norm", "planes") for n in (1, 4, 16) for c in (16, 64, 512)
    ),
    "poolings": tuple(
        f"pool {n},{c},{size},{size}" for n, c, size in ((1, 16, 14), (1, 64, 28), (4, 64, 28), (8, 64, 112))
    ),
}

# ---- the constants

CLAMP = r"std::clamp<int64_t>"
FORWARD, INPUT, WEIGHT = ("forward",), ("input_grad",), ("weight_grad",)
BOTH, GRADIENTS, ALL = FORWARD + INPUT, INPUT + WEIGHT, FORWARD + INPUT + WEIGHT
NORM = ("forward", "backward")  # and max pooling
F32, BF16 = ("fp32",), ("bf16",)


def kib(*values: int) -> tuple[int, ...]:
    return tuple(1024 * value for value in values)


SIZES = kib(16, 32, 64, 128, 256)

TABLE = {
    Of("conv/paths.cpp", "strided_depthwise", GRADIENTS, F32): (
        ("kMaxStridedKernel", "columns up to which gradients of strided kernels are PyTorch's", (0, 3, 5, 7)),
    ),
    Of("conv/paths.cpp", "dense + close", ALL): (
        ("kWeightPlace", "estimate: transforming one place of a weight, in products", (10, 20, 30, 45, 60)),
        ("kWin", "share of the definition's time under which Winograd's estimate must be", (0.8, 0.9, 0.95, 1.0, 1.1)),
    ),
    Of("conv/paths.cpp", "dense + close", BOTH): (
        ("kInputPlace", "estimate: transforming one place of a tile of inputs", (2, 3, 4, 6, 8)),
        ("kOutputPlace", "estimate: transforming one of outputs", (10, 15, 20, 25, 30)),
    ),
    Of("conv/paths.cpp", "dense + close", WEIGHT): (
        ("kGradientPlace", "estimate: transforming one of either for the weight gradient", (9, 13, 18, 24, 30)),
    ),
    Of("conv/paths.cpp", "dense + close", BOTH, BF16): (
        ("kPairs", "bfloat16 products of the definition in the time of one of float32", (1.8, 2, 2.2, 2.3, 2.5, 2.8)),
    ),
    Of("conv/paths.cpp", "dense + close", WEIGHT, BF16): (
        ("kGradientPairs", "the same as kPairs for the weight gradient", (1.6, 1.8, 2, 2.2, 2.5)),
    ),
    Of("conv/paths.cpp", "shallow", FORWARD, F32, True): (
        ("kMinDepth", "channels from which on tiles of 4x4 are exact enough in float32", (24, 40, 48, 58, 64, 96)),
    ),
    Of("conv/paths.cpp", "many_units", BOTH): (
        ("kMaxUnits", "units of all pixels that stay in the third-level cache", kib(256, 512, 1024, 2048, 4096)),
    ),
    Of("conv/paths.cpp", "long_panels", FORWARD): (
        (
            "kMaxPanelUnits",
            "units of a panel of the weight that stay in the second-level cache",
            kib(64, 96, 160, 256, 512),
        ),
    ),
    Of("conv/paths.cpp", "few_pixels", BOTH): (
        ("kMaxPixels", "pixels for each column of one product that reads images in place", (1, 2, 3, 4, 6, 8)),
    ),
    Of("conv/paths.cpp", "few_copied", FORWARD): (
        ("kMaxCopied", "pixels for each column of one that copies them, of one tap", (0.25, 0.5, 1, 2, 4)),
    ),
    Of("conv/paths.cpp", "few_copied_taps", BOTH): (
        ("kMaxCopiedTaps", "pixels for each column of one that copies them, of several", (0.125, 0.25, 0.5, 1, 2)),
    ),
    Of("conv/paths.cpp", "columns", FORWARD): (
        ("kMaxIdle", "time of all tasks to that of as many columns in full panels", (1.0, 1.06, 1.12, 1.2, 1.35, 2.0)),
    ),
    Of("conv/paths.cpp", "few_rows", INPUT, BF16): (
        ("kMaxProductRows", "rows up to which PyTorch multiplies with the weight in place", (0, 4, 8, 16, 32, 64)),
    ),
    Of("conv/paths.cpp", "first", WEIGHT): (
        ("kMaxFirstLayer", "input channels up to which panels are those of dy", (0, 2, 3, 4, 6, 8)),
    ),
    Of("conv/first_layer_weight_grad.cpp", "first", WEIGHT): (
        ("first_layer_pixels", "pixels of a block", (128, 256, 512, 1024), r"ceil_div\((\d+), p_\.w\.outputs\)"),
    ),
    Of("conv/implicit_gemm.cpp", "products", BOTH): (
        ("kBandUnits", "units of a band and its outputs in the second-level cache", kib(16, 32, 48, 64, 96)),
        ("kMinPixels", "pixels of a row that use a panel from the third-level cache", (14, 28, 48, 96, 192)),
        (
            "strip_products",
            "products of a pixel from which on a strip has min_tiles",
            (256, 512, 1024),
            rf"{CLAMP}\((\d+) /",
        ),
        ("min_tiles", "the fewest tiles of pixels of a strip", (1, 2, 4, 8), rf"{CLAMP}\(\d+ / [^;]*, (\d+), \d+\);"),
        ("max_tiles", "the most tiles of pixels of a strip", (8, 16, 32, 64), rf"{CLAMP}\(\d+ / [^;]*, \d+, (\d+)\);"),
    ),
    Of("conv/winograd_forward.cpp", "dense", BOTH): (
        ("kInputUnits", "units of a block in the second-level cache", kib(64, 96, 160, 224, 320)),
        ("kPackedDepth", "channels of the weight that are transformed at a time", (16, 32, 64, 128, 256)),
        ("min_block", "the fewest tiles of a block", (8, 16, 24, 48), rf"{CLAMP}\(kInputUnits / [^;]*, (\d+), \d+\);"),
        (
            "max_block",
            "the most tiles of a block",
            (64, 96, 128, 192, 256),
            rf"{CLAMP}\(kInputUnits / [^;]*, \d+, (\d+)\);",
        ),
    ),
    Of("conv/winograd_forward.cpp", "large_weights", BOTH): (
        ("kSharedUnits", "units of inputs that are transformed at once", kib(0, 1024, 2048, 4096, 8192, 16384)),
        (
            "panel_block",
            "tiles that meet a panel at once",
            (16, 32, 64, 128),
            r"ceil_div\(tiles\.count\(\), ceil_div\(tiles\.count\(\), (\d+)\)\)",
        ),
    ),
    Of("conv/winograd_weight_grad.cpp", "dense", WEIGHT): (
        ("kSumUnits", "units of sums in the second-level cache", kib(64, 96, 160, 224, 320)),
        ("kGradientUnits", "units of a block in the third-level cache", kib(256, 512, 1024, 2048, 4096)),
        ("kOuterTiles", "tiles whose inputs stay in the first-level cache", (32, 64, 128, 192, 256)),
        ("min_block", "the fewest tiles of a block", (64, 128, 192), rf"{CLAMP}\(kGradientUnits / \w+, (\d+), \d+\)"),
        (
            "max_block",
            "the most tiles of a block",
            (256, 512, 768, 1024),
            rf"{CLAMP}\(kGradientUnits / \w+, \d+, (\d+)\)",
        ),
    ),
    Of("conv/winograd.h", "dense + shallow", ALL, F32, True): (
        ("kShortChunk", "products that are summed in registers", (16, 32, 64, 128)),
    ),
    Of("conv/weight_grad.cpp", "products", WEIGHT): (
        ("kMinPixels", "the fewest pixels of a block", (100, 200, 400, 600)),
        ("kMaxPixels", "the most pixels of a block", (400, 600, 800, 1200, 1600)),
    ),
    Of("conv/weight_grad.cpp", "products", WEIGHT, BF16): (
        ("kPairUnits", "units of dy of a block in the second-level cache", kib(32, 48, 64, 96, 128)),
    ),
    Of("conv/weight_grad.cpp", "products", WEIGHT, F32): (
        ("kFloatUnits", "units of dy and x of a block in the second-level cache", kib(40, 64, 80, 112, 160)),
    ),
    Of("conv/weight_grad.cpp", "unequal + linears", WEIGHT): (
        ("max_transposed", "elements of a weight whose sums are transposed", SIZES, r"&& out \* in <= (\d+ \* 1024)"),
        ("max_of_pixels", "elements of a weight whose pixels threads share", SIZES, r"size <= (\d+ \* 1024) \? 1"),
    ),
    Of("conv/depthwise.h", "depthwise + grouped", ALL): (
        ("kRingFloats", "floats of input rows that a ring keeps", kib(4, 8, 16, 32)),
        ("kMaxVectors", "vectors of channels in a ring", (1, 2, 4, 8, 16)),
        ("kBandBytes", "bytes of x and y in a task", kib(32, 64, 128, 256, 512)),
    ),
    Of("conv/depthwise_weight_grad.cpp", "depthwise + grouped", WEIGHT): (
        ("kMaxParts", "parts of the images, each with its own sums", (8, 16, 32, 64)),
    ),
    Of("conv/depthwise_weight_grad.cpp", "depthwise + grouped", WEIGHT, F32, True): (
        ("kChunkPixels", "pixels that are summed in one float32", (16, 32, 64, 128, 256)),
    ),
    Of("conv/scratch.cpp", "dense + products", ALL): (
        ("kLarge", "bytes from which on memory is in huge pages", kib(256, 512, 1024, 2048, 4096)),
    ),
    Of("microkernels/*.h", "grouped", ALL, BF16): (
        (
            "max_group_of_pairs",
            "channels of a group above which it is PyTorch's",
            (1, 2, 4, 8),
            r"max_group = S::pair == 2 \? (\d+) : \d+",
        ),
    ),
    Of("microkernels/*.h", "grouped", ALL, F32): (
        (
            "max_group",
            "channels of a group above which it is PyTorch's, without pairs",
            (1, 2, 4, 8),
            r"max_group = S::pair == 2 \? \d+ : (\d+)",
        ),
    ),
    Of("microkernels/*.h", "products", BOTH, F32, True): (
        ("kMinChunk", "the fewest products that are summed in registers", (16, 32, 64, 128)),
        ("kMaxChunk", "the most products that are summed in registers", (128, 256, 512, 1024)),
        (
            "chunks",
            "chunks of a sum, between kMinChunk and kMaxChunk",
            (1, 2, 4, 8),
            r"tile\.taps \* tile\.depth / (\d+)",
        ),
    ),
    Of("microkernels/*.h", "products", WEIGHT, F32, True): (
        ("chunk", "pixels that are summed in registers", (16, 32, 64, 128, 256), r"int64_t chunk = (\d\d+);"),
    ),
    Of("microkernels/*.h", "linears + large_weights", BOTH): (
        ("kBytesAhead", "bytes of a row of the weight that are fetched before they are packed", (64, 128, 256, 512)),
        ("kUnitsAhead", "units of its depth that are fetched before they are packed", (4, 8, 16, 32, 64)),
    ),
    Of("norm/*.h", "norms", NORM): (("kStreams", "rows that are walked at once", (1, 2, 4, 6, 8)),),
    Of("norm/*.h", "norms", NORM, F32, True): (
        ("kShortSums", "rows that are summed in float32, then in double", (1, 4, 8, 16, 32)),
        ("kGroup", "rows of each of three means whose median is a center", (1, 2, 4, 8)),
    ),
    Of("norm/*.h", "planes", NORM): (("kPlaneGroup", "channels that are summed together", (1, 64, 128, 256, 512)),),
    Of("norm/*.h", "planes", NORM, F32, True): (
        ("kRun", "vectors of a plane that are summed in float32", (2, 4, 8, 16, 32)),
    ),
    Of("slim_batch_norm.cpp", "small_norms", NORM): (
        ("kGrain", "elements that are worth a thread", kib(4, 8, 16, 32, 64)),
        ("min_vectors", "vectors of a row whose columns threads may share", (2, 4, 8, 16), r"cols >= (\d+) \* width"),
    ),
    Of("slim_batch_norm.cpp", "norms", NORM): (
        ("kMinRows", "the fewest rows of a part", (16, 32, 64, 128, 256)),
        ("kMaxParts", "parts of the sums", (4, 8, 16, 32)),
    ),
    Of("slim_batch_norm.cpp", "narrow_norms", NORM): (
        ("kMaxFold", "rows that are folded into one", (1, 4, 8, 16, 32)),
        (
            "least_gain",
            "share of idle lanes that is worth another fold",
            (0.8, 0.9, 0.97, 0.99),
            r"< ([\d.]+) \* waste\(best\)",
        ),
    ),
    Of("slim_max_pool2d.cpp", "poolings", NORM): (("kGrain", "values that are worth a thread", kib(4, 8, 16, 32, 64)),),
}
CONSTANTS = [Constant(of, *row) for of, rows in TABLE.items() for row in rows]

NOT_FITTED = {  # (glob, name) of other numbers: why
    ("conv/scratch.cpp", "kHugePage"): "2 MiB on x86-64",
    ("conv/winograd.h", "kMaxTileInputs"): "6 x 6, by the definition of F(4 x 4, 3 x 3)",
    ("conv/winograd.h", "kMaxTileOutputs"): "4 x 4, likewise",
    ("microkernels/winograd.h", "outputs"): "m of F(m x m, 3 x 3)",
    ("microkernels/winograd.h", "inputs"): "m + 2",
    ("microkernels/winograd.h", "a"): "a point of F(4 x 4, 3 x 3), which decides about the error alone",
    ("microkernels/winograd.h", "b"): "the other one",
    ("microkernels/depthwise.h", "max_outer_columns"): "columns of the widest kernel whose sums fit the registers",
    ("norm/*.h", "page"): "bytes after which addresses meet in a set of the first-level cache",
    ("simd/*.h", "lanes"): "of the instruction set",
    ("simd/*.h", "registers"): "of the instruction set",
    ("simd/*.h", "pair"): "bfloat16 products of an instruction",
    ("simd/*.h", "max_rows"): "rows of 2 vectors that fill the registers, beside the weight and an input",
}
