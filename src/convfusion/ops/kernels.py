"""The Triton kernels: what one program does. `launch` calls them in order.

Layout. Maps are tokens [B, H·W, channels], channels contiguous, so neighbouring threads read
neighbouring addresses. A program of a convolution owns ROWS rows × COLS columns × CHANNELS
channels. The columns are not an axis of its tensors but a tuple of them, which stays in registers:
an input value is loaded once per kernel row and meets every column that needs it, so COLS·K
multiply-adds cost COLS + K - 1 loads. The rows of a program share their K - 1 halo rows through
the L1 cache.

Arithmetic is float32 whatever the dtype of the maps. Every offset into a map is 64 bits wide. No
kernel adds into memory that another program writes, so the same input gives the same bits.

Names in capitals are compile-time constants. Of a map with all its channels, C is also the number
of elements from one pixel to the next; a slice of channels has a STRIDE and a START.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(pid, height, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Picture, first row and first column of a tile, counted along the columns first."""
    wide = tl.cdiv(width, COLS)
    tall = tl.cdiv(height, ROWS)
    return pid // (wide * tall), pid // wide % tall * ROWS, pid % wide * COLS


@triton.jit
def lines(base, picture, rows, channels, height, width, STRIDE: tl.constexpr):
    """Pointers to column 0 of some rows of a picture: [rows, channels]."""
    first = (tl.cast(picture, tl.int64) * height + rows) * width * STRIDE
    return base + first[:, None] + channels[None, :]


@triton.jit
def read(line, column, width, inside, STRIDE: tl.constexpr):
    """One column of the rows that `line` points to, in float32; zero outside of the map."""
    offset = tl.cast(column, tl.int64) * STRIDE
    return tl.load(line + offset, mask=inside & (column >= 0) & (column < width), other=0.0).to(
        tl.float32
    )


@triton.jit
def write(line, column, width, inside, value, STRIDE: tl.constexpr):
    """The inverse of `read`, in the dtype of the map."""
    pointer = line + tl.cast(column, tl.int64) * STRIDE
    tl.store(pointer, value.to(line.dtype.scalar.element_ty), mask=inside & (column < width))


@triton.jit
def convolve(
    x, weights, picture, row0, col0, channels, known, height, width,
    C: tl.constexpr, KERNEL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    CHANNELS: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Depthwise sums of a tile: a tuple of COLS tensors [ROWS, CHANNELS].

    Weights are [K·K, C]; FLIP turns them by 180°, which makes this its own transpose.
    """
    acc = (tl.zeros((ROWS, CHANNELS), tl.float32),) * COLS
    # Kernel rows that meet the map at all: of a K larger than the map, few do.
    low = tl.maximum(0, KERNEL // 2 - row0 - (ROWS - 1))
    high = tl.minimum(KERNEL, height - row0 + KERNEL // 2)
    for ky in range(low, high):
        rows = row0 + tl.arange(0, ROWS) + ky - KERNEL // 2
        inside = ((rows >= 0) & (rows < height))[:, None] & known[None, :]
        line = lines(x, picture, rows, channels, height, width, C)
        taps = ()
        for kx in tl.static_range(KERNEL):
            tap = ky * KERNEL + kx
            if FLIP:
                tap = KERNEL * KERNEL - 1 - tap
            weight = tl.load(weights + tap * C + channels, mask=known, other=0.0)
            taps += (weight.to(tl.float32)[None, :],)
        for j in tl.static_range(COLS + KERNEL - 1):
            value = read(line, col0 + j - KERNEL // 2, width, inside, C)
            met = ()
            for t in tl.static_range(COLS):
                total = acc[t]
                if j - t >= 0 and j - t < KERNEL:
                    total += value * taps[j - t]
                met += (total,)
            acc = met
    return acc


@triton.jit
def halve(
    x, pooled, picture, row0, col0, channels, known, height, width,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write the 2×2 means of a tile that the program has just read, so that it finds it in cache.

    ROWS and COLS are even, so no window crosses a tile.
    """
    small_height, small_width = tl.cdiv(height, 2), tl.cdiv(width, 2)
    rows = row0 // 2 + tl.arange(0, ROWS // 2)
    inside = (rows < small_height)[:, None] & known[None, :]
    two = (rows * 2 + 1 < height)[:, None]
    upper = lines(x, picture, rows * 2, channels, height, width, C)
    lower = lines(x, picture, rows * 2 + 1, channels, height, width, C)
    line = lines(pooled, picture, rows, channels, small_height, small_width, C)
    for t in tl.static_range(COLS // 2):
        column = col0 + 2 * t
        total = read(upper, column, width, inside, C) + read(lower, column, width, inside & two, C)
        total += read(upper, column + 1, width, inside, C)
        total += read(lower, column + 1, width, inside & two, C)
        held = tl.where(two, 2.0, 1.0) * tl.where(column + 1 < width, 2.0, 1.0)
        write(line, column // 2, small_width, inside, total / held, C)


@triton.jit
def halves(
    x, weights, pooled, picture, row0, col0, channels, known, height, width,
    C: tl.constexpr, KERNEL: tl.constexpr, POOL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Depthwise sums of a tile in both halves of the channels, which the gate lets meet.

    With POOL the 2×2 means of both are written on the way.
    """
    other = channels + C // 2
    first = convolve(
        x, weights, picture, row0, col0, channels, known, height, width,
        C, KERNEL, ROWS, COLS, CHANNELS, False,
    )  # fmt: skip
    second = convolve(
        x, weights, picture, row0, col0, other, known, height, width,
        C, KERNEL, ROWS, COLS, CHANNELS, False,
    )  # fmt: skip
    if POOL:
        halve(x, pooled, picture, row0, col0, channels, known, height, width, C, ROWS, COLS)
        halve(x, pooled, picture, row0, col0, other, known, height, width, C, ROWS, COLS)
    return first, second


@triton.jit
def conv_gate(
    x, weights, out, pooled, scale, height, width,
    OUT_STRIDE: tl.constexpr, C: tl.constexpr, KERNEL: tl.constexpr,
    SIGMOID: tl.constexpr, POOL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One stage: x [B, N, C] → gate(depthwise(x)), into the first C/2 channels of `out`.

    With POOL also the input of the next stage, [B, ⌈H/2⌉·⌈W/2⌉, C].
    """
    picture, row0, col0 = place(tl.program_id(0), height, width, ROWS, COLS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channels < C // 2
    first, second = halves(
        x, weights, pooled, picture, row0, col0, channels, known, height, width,
        C, KERNEL, POOL, ROWS, COLS, CHANNELS,
    )  # fmt: skip
    rows = row0 + tl.arange(0, ROWS)
    inside = (rows < height)[:, None] & known[None, :]
    line = lines(out, picture, rows, channels, height, width, OUT_STRIDE)
    for t in tl.static_range(COLS):
        other = tl.sigmoid(second[t]) if SIGMOID else second[t] * scale
        write(line, col0 + t, width, inside, first[t] * other, OUT_STRIDE)


@triton.jit
def conv_gate_grad(
    x, weights, grad, out, pooled, scale, height, width,
    GRAD_STRIDE: tl.constexpr, C: tl.constexpr, KERNEL: tl.constexpr,
    SIGMOID: tl.constexpr, POOL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient before the gate [B, N, C] from that behind it; the depthwise sums are redone.

    With POOL also the input of the next stage, as in `conv_gate`.
    """
    picture, row0, col0 = place(tl.program_id(0), height, width, ROWS, COLS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    half: tl.constexpr = C // 2
    known = channels < half
    first, second = halves(
        x, weights, pooled, picture, row0, col0, channels, known, height, width,
        C, KERNEL, POOL, ROWS, COLS, CHANNELS,
    )  # fmt: skip
    rows = row0 + tl.arange(0, ROWS)
    inside = (rows < height)[:, None] & known[None, :]
    come = lines(grad, picture, rows, channels, height, width, GRAD_STRIDE)
    to_first = lines(out, picture, rows, channels, height, width, C)
    to_second = lines(out, picture, rows, channels + half, height, width, C)
    for t in tl.static_range(COLS):
        column = col0 + t
        given = read(come, column, width, inside, GRAD_STRIDE)
        if SIGMOID:
            opened = tl.sigmoid(second[t])
            write(to_first, column, width, inside, given * opened, C)
            slope = opened * (1.0 - opened)
            write(to_second, column, width, inside, given * first[t] * slope, C)
        else:
            write(to_first, column, width, inside, given * (second[t] * scale), C)
            write(to_second, column, width, inside, given * (first[t] * scale), C)


@triton.jit
def conv_input_grad(
    grad, weights, coarse, out, height, width,
    COARSE: tl.constexpr, C: tl.constexpr, KERNEL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of a stage's input [B, N, C] from that before its gate.

    With COARSE also what comes back from the next stage, whose input was this one's 2×2 means.
    """
    picture, row0, col0 = place(tl.program_id(0), height, width, ROWS, COLS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channels < C
    acc = convolve(
        grad, weights, picture, row0, col0, channels, known, height, width,
        C, KERNEL, ROWS, COLS, CHANNELS, True,
    )  # fmt: skip
    rows = row0 + tl.arange(0, ROWS)
    inside = (rows < height)[:, None] & known[None, :]
    line = lines(out, picture, rows, channels, height, width, C)
    small_height, small_width = tl.cdiv(height, 2), tl.cdiv(width, 2)
    tall = tl.where(rows // 2 * 2 + 1 < height, 2.0, 1.0)[:, None]
    for t in tl.static_range(COLS):
        column = col0 + t
        total = acc[t]
        if COARSE:
            up = lines(coarse, picture, rows // 2, channels, small_height, small_width, C)
            held = tall * tl.where(column // 2 * 2 + 1 < width, 2.0, 1.0)
            total += read(up, column // 2, small_width, inside, C) / held
        write(line, column, width, inside, total, C)


@triton.jit
def conv_weight_grad(
    x, grad, partial, groups, per_chunk, height, width,
    C: tl.constexpr, KERNEL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One row of the kernel's gradient, over one chunk of the pixels: partial [chunks, K·K, C].

    A group is ROWS rows of one picture; a chunk is `per_chunk` groups in order.
    """
    chunk, ky = tl.program_id(0), tl.program_id(2)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channels < C
    tall = tl.cdiv(height, ROWS)
    acc = (tl.zeros((ROWS, CHANNELS), tl.float32),) * KERNEL
    for group in range(chunk * per_chunk, tl.minimum((chunk + 1) * per_chunk, groups)):
        rows = group % tall * ROWS + tl.arange(0, ROWS)
        above = rows + ky - KERNEL // 2
        here = (rows < height)[:, None] & known[None, :]
        there = here & ((above >= 0) & (above < height))[:, None]
        grads = lines(grad, group // tall, rows, channels, height, width, C)
        line = lines(x, group // tall, above, channels, height, width, C)
        for col0 in range(0, width, COLS):
            given = ()
            for t in tl.static_range(COLS):
                given += (read(grads, col0 + t, width, here, C),)
            for j in tl.static_range(COLS + KERNEL - 1):
                value = read(line, col0 + j - KERNEL // 2, width, there, C)
                met = ()
                for kx in tl.static_range(KERNEL):
                    total = acc[kx]
                    if j - kx >= 0 and j - kx < COLS:
                        total += value * given[j - kx]
                    met += (total,)
                acc = met
    line = partial + (tl.cast(chunk, tl.int64) * KERNEL + ky) * KERNEL * C + channels
    for kx in tl.static_range(KERNEL):
        tl.store(line + kx * C, tl.sum(acc[kx], 0), mask=known)


@triton.jit
def source(target, scale, side):
    """Bilinear interpolation: the two source rows of target rows, and the share of the second.

    PyTorch's rule for align_corners=False: (target + 1/2)·scale - 1/2, not below zero.
    """
    where = tl.maximum((target.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    lower = tl.minimum(where.to(tl.int32), side - 1)
    return lower, tl.minimum(lower + 1, side - 1), where - lower.to(tl.float32)


@triton.jit
def upsample(
    small, out, small_height, small_width, height, width, scale_y, scale_x,
    OUT_STRIDE: tl.constexpr, OUT_START: tl.constexpr, C: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Bilinear interpolation of [B, n, C] to the full grid, into channels OUT_START… of `out`."""
    blocks = tl.cdiv(height * width, PIXELS)
    picture = tl.program_id(0) // blocks
    pixels = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (pixels < height * width)[:, None] & (channels < C)[None, :]
    top, bottom, down = source(pixels // width, scale_y, small_height)
    left, right, across = source(pixels % width, scale_x, small_width)
    across = across[:, None]
    upper = lines(small, picture, top, channels, small_height, small_width, C)
    lower = lines(small, picture, bottom, channels, small_height, small_width, C)
    left, right = left.to(tl.int64)[:, None] * C, right.to(tl.int64)[:, None] * C
    above = tl.load(upper + left, mask=inside, other=0.0).to(tl.float32) * (1.0 - across)
    above += tl.load(upper + right, mask=inside, other=0.0).to(tl.float32) * across
    below = tl.load(lower + left, mask=inside, other=0.0).to(tl.float32) * (1.0 - across)
    below += tl.load(lower + right, mask=inside, other=0.0).to(tl.float32) * across
    mixed = above * (1.0 - down)[:, None] + below * down[:, None]
    # One pixel is a row of one column here.
    line = lines(out, picture, pixels, channels + OUT_START, height * width, 1, OUT_STRIDE)
    tl.store(line, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def share(target, pixel, scale, side):
    """How much of source row `pixel` is in target rows: the transpose of `source`."""
    lower, upper, second = source(target, scale, side)
    return tl.where(lower == pixel, 1.0 - second, 0.0) + tl.where(upper == pixel, second, 0.0)


@triton.jit
def first_target(pixel, side, target_side):
    """A row at or before the first target row that source row `pixel` is part of."""
    earliest = tl.maximum((2 * pixel.to(tl.int64) - 1) * target_side - side, 0) // (2 * side)
    return earliest.to(tl.int32)


@triton.jit
def upsample_grad(
    grad, out, small_height, small_width, height, width, scale_y, scale_x, reach_y, reach_x,
    GRAD_STRIDE: tl.constexpr, GRAD_START: tl.constexpr, C: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Transpose of `upsample`: each small pixel gathers from the targets that it was part of."""
    blocks = tl.cdiv(small_height * small_width, PIXELS)
    picture = tl.program_id(0) // blocks
    pixels = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (pixels < small_height * small_width)[:, None] & (channels < C)[None, :]
    row, column = pixels // small_width, pixels % small_width
    top = first_target(row, small_height, height)
    left = first_target(column, small_width, width)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for dy in range(reach_y):
        y = top + dy
        weight_y = tl.where(y < height, share(y, row, scale_y, small_height), 0.0)
        line = lines(grad, picture, y, channels + GRAD_START, height, width, GRAD_STRIDE)
        for dx in range(reach_x):
            x = left + dx
            weight = weight_y * tl.where(x < width, share(x, column, scale_x, small_width), 0.0)
            met = inside & (weight > 0.0)[:, None]
            pointer = line + x.to(tl.int64)[:, None] * GRAD_STRIDE
            total += weight[:, None] * tl.load(pointer, mask=met, other=0.0).to(tl.float32)
    line = lines(out, picture, pixels, channels, small_height * small_width, 1, C)
    tl.store(line, total.to(out.dtype.element_ty), mask=inside)
