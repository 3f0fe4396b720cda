// Expands packed weights on the device, eight numbers a thread, and multiplies with them without expanding.
//
// Compiled at run time, so it includes nothing. Macros, given when it is compiled:
//   OUT_BF16, OUT_FP16 or OUT_FP32   what weights expand to, and what vectors consist of
//   NF4_TABLE, FP4_TABLE             the sixteen numbers of a code, separated by commas
//
// A row's packed bytes begin where its codes begin, so rows are found by multiplication and numbers are independent of
// each other; only `expand_lossless` counts, within the 256 numbers that a warp expands. `is_wide` says that every
// row begins on an address that eight numbers can be moved from and to in one piece.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if defined(OUT_FP32)
typedef float number;
__device__ __forceinline__ number narrow(float value) { return value; }
__device__ __forceinline__ float widen(number value) { return value; }
#elif defined(OUT_FP16)
typedef u16 number;
__device__ __forceinline__ number narrow(float value) {
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
__device__ __forceinline__ float widen(number half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}
#elif defined(OUT_BF16)
typedef u16 number;
__device__ __forceinline__ number narrow(float value) {  // of finite numbers; to the nearest, ties to even
    u32 bits = __float_as_uint(value);
    return (number)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
__device__ __forceinline__ float widen(number half) { return __uint_as_float((u32)half << 16); }
#endif

struct __align__(16) Eight {
    number at[8];
};

__device__ __forceinline__ void store(number* out, const Eight& values, u32 count, bool is_wide) {
    if (is_wide && count == 8) {
        *reinterpret_cast<Eight*>(out) = values;
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        if (i < count) out[i] = values.at[i];
}

// Eight bytes, or as many as there are.
__device__ __forceinline__ u64 load_bytes(const u8* from, u32 count, bool is_wide) {
    if (is_wide && count == 8) return *reinterpret_cast<const u64*>(from);
    u64 bytes = 0;
    for (u32 i = 0; i < count; ++i) bytes |= (u64)from[i] << (8 * i);
    return bytes;
}

// The four bytes of eight codes of four bits, or as many as there are.
__device__ __forceinline__ u32 load_nibbles(const u8* from, u32 count, bool is_wide) {
    if (is_wide && count == 8) return *reinterpret_cast<const u32*>(from);
    u32 bytes = 0;
    for (u32 i = 0; i < (count + 1) / 2; ++i) bytes |= (u32)from[i] << (8 * i);
    return bytes;
}

__device__ __forceinline__ float scale_of(u8 scale, u8 exponent) {
    return __uint_as_float((((u32)exponent << 5) + scale) << 18);
}

// Number i of eight codes of four bits: the first of two is the upper half of its byte.
__device__ __forceinline__ u32 nibble(u32 packed, u32 i) { return (packed >> (4 * (i ^ 1))) & 15u; }

__device__ __forceinline__ float whole(u64 packed, u32 i) { return (float)(signed char)(u8)(packed >> (8 * i)); }

__constant__ float NF4[16] = {NF4_TABLE};
__constant__ float FP4[16] = {FP4_TABLE};

__device__ __forceinline__ void copy_table(float* shared, const float* table) {
    if (threadIdx.x < 16) shared[threadIdx.x] = table[threadIdx.x];
    __syncthreads();
}

// Which eight numbers a thread has: row, first column and how many there are.
struct Place {
    u64 row;
    u32 column, count, blocks;

    __device__ __forceinline__ Place(u32 index, u32 columns) {
        u32 in_row = (columns + 7) / 8;
        row = index / in_row;
        column = (index % in_row) * 8;
        count = min(8u, columns - column);
        blocks = (columns + 63) / 64;
    }
};

__device__ __forceinline__ void expand_4bit(
    const float* table, const u8* codes, const u8* scales, const u8* exponents, number* out,
    u32 eights, u32 columns, u32 is_wide) {
    __shared__ float shared[16];
    copy_table(shared, table);
    u32 index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= eights) return;
    Place at(index, columns);
    u32 packed = load_nibbles(codes + at.row * ((columns + 1) / 2) + at.column / 2, at.count, is_wide);
    float scale = scale_of(scales[at.row * at.blocks + at.column / 64], exponents[at.row]);
    Eight values;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) values.at[i] = narrow(shared[nibble(packed, i)] * scale);
    store(out + at.row * columns + at.column, values, at.count, is_wide);
}

extern "C" __global__ void expand_nf4(
    const u8* codes, const u8* scales, const u8* exponents, number* out, u32 eights, u32 columns, u32 is_wide) {
    expand_4bit(NF4, codes, scales, exponents, out, eights, columns, is_wide);
}

extern "C" __global__ void expand_fp4(
    const u8* codes, const u8* scales, const u8* exponents, number* out, u32 eights, u32 columns, u32 is_wide) {
    expand_4bit(FP4, codes, scales, exponents, out, eights, columns, is_wide);
}

extern "C" __global__ void expand_int8(
    const u8* codes, const u8* scales, const u8* exponents, number* out, u32 eights, u32 columns, u32 is_wide) {
    u32 index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= eights) return;
    Place at(index, columns);
    u64 packed = load_bytes(codes + at.row * columns + at.column, at.count, is_wide);
    float scale = scale_of(scales[at.row * at.blocks + at.column / 64], exponents[at.row]);
    Eight values;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) values.at[i] = narrow(whole(packed, i) * scale);
    store(out + at.row * columns + at.column, values, at.count, is_wide);
}

// A warp expands 256 numbers of a row. Code 7 means that the exponent is the next one of the matrix's list of escapes;
// `starts` says how many came before these 256, the warp adds how many its lower lanes have.
extern "C" __global__ void expand_lossless(
    const u8* mantissas, const u8* codes, const u32* starts, const u8* escapes, const u8* books, number* out,
    u32 warps, u32 columns, u32 rows_a_matrix, u32 escapes_a_matrix, u32 is_wide) {
    u32 warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (warp >= warps) return;
    u32 in_row = (columns + 255) / 256, code_bytes = (columns + 7) / 8 * 3;
    u64 row = warp / in_row;
    u32 column = (warp % in_row) * 256 + lane * 8;
    u32 count = column < columns ? min(8u, columns - column) : 0;
    u64 matrix = row / rows_a_matrix;

    u32 packed = 0;  // code i in bits 3 i to 3 i + 2
    if (count) {
        const u8* own_codes = codes + row * code_bytes + column / 8 * 3;
        packed = own_codes[0] | (u32)own_codes[1] << 8 | (u32)own_codes[2] << 16;
    }
    u32 own = __popc(packed & packed >> 1 & packed >> 2 & 0x249249u), sum = own;
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2) {
        u32 other = __shfl_up_sync(0xFFFFFFFFu, sum, distance);
        if (lane >= distance) sum += other;
    }
    if (!count) return;

    const u8* next = escapes + matrix * escapes_a_matrix + (starts[warp] + sum - own);
    const u32* book = reinterpret_cast<const u32*>(books + matrix * 8);
    u32 lower = book[0], upper = book[1];
    u64 signs = load_bytes(mantissas + row * columns + column, count, is_wide);
    Eight values;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        u32 code = (packed >> (3 * i)) & 7u;
        u32 exponent = __byte_perm(lower, upper, code) & 255u;
        if (code == 7) exponent = *next++;
        u32 sign = (u32)(signs >> (8 * i)) & 255u;
        u32 bits = (sign & 0x80u) << 8 | exponent << 7 | (sign & 0x7Fu);
#if defined(OUT_BF16)
        values.at[i] = (number)bits;
#else
        values.at[i] = narrow(__uint_as_float(bits << 16));
#endif
    }
    store(out + row * columns + column, values, count, is_wide);
}

// out[row] = sum of weight[row, column] * x[column]: a warp a row, sums in float32, columns a multiple of eight.
__device__ __forceinline__ void finish(float sum, number* out, u32 row) {
#pragma unroll
    for (u32 distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
    if (threadIdx.x % 32 == 0) out[row] = narrow(sum);
}

__device__ __forceinline__ void multiply_4bit(
    const float* table, const u8* codes, const u8* scales, const u8* exponents, const number* x, number* out,
    u32 rows, u32 columns) {
    __shared__ float shared[16];
    copy_table(shared, table);
    u32 row = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (row >= rows) return;
    const u8* row_codes = codes + (u64)row * (columns / 2);
    const u8* row_scales = scales + (u64)row * ((columns + 63) / 64);
    u8 exponent = exponents[row];
    float sum = 0;
#pragma unroll 4
    for (u32 column = threadIdx.x % 32 * 8; column < columns; column += 256) {
        u32 packed = *reinterpret_cast<const u32*>(row_codes + column / 2);
        Eight values = *reinterpret_cast<const Eight*>(x + column);
        float part = 0;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) part += shared[nibble(packed, i)] * widen(values.at[i]);
        sum += part * scale_of(row_scales[column / 64], exponent);
    }
    finish(sum, out, row);
}

extern "C" __global__ void multiply_nf4(
    const u8* codes, const u8* scales, const u8* exponents, const number* x, number* out, u32 rows, u32 columns) {
    multiply_4bit(NF4, codes, scales, exponents, x, out, rows, columns);
}

extern "C" __global__ void multiply_fp4(
    const u8* codes, const u8* scales, const u8* exponents, const number* x, number* out, u32 rows, u32 columns) {
    multiply_4bit(FP4, codes, scales, exponents, x, out, rows, columns);
}

extern "C" __global__ void multiply_int8(
    const u8* codes, const u8* scales, const u8* exponents, const number* x, number* out, u32 rows, u32 columns) {
    u32 row = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (row >= rows) return;
    const u8* row_codes = codes + (u64)row * columns;
    const u8* row_scales = scales + (u64)row * ((columns + 63) / 64);
    u8 exponent = exponents[row];
    float sum = 0;
#pragma unroll 4
    for (u32 column = threadIdx.x % 32 * 8; column < columns; column += 256) {
        u64 packed = *reinterpret_cast<const u64*>(row_codes + column);
        Eight values = *reinterpret_cast<const Eight*>(x + column);
        float part = 0;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) part += whole(packed, i) * widen(values.at[i]);
        sum += part * scale_of(row_scales[column / 64], exponent);
    }
    finish(sum, out, row);
}
