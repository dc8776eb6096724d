// Instructions of compute capability 9.0a: tensor memory access, barriers in shared memory, products of warp groups.
#pragma once

#include "fastden.h"
#include "platform.cuh"
#include "tensor_map.cuh"

namespace fastden {

// The layout of a box in shared memory, with channels innermost. A row has 128 bytes of channels: part p (16 bytes) of
// row r lies at position p ^ r % 8, and eight rows are a group of 1024 aligned bytes. Or a row has 64 bytes: part p of
// row r lies at p ^ r / 2 % 4, and eight rows are 512 aligned bytes. Or it has 32 bytes: part p lies at p ^ r / 4 % 2,
// and eight rows are 256 aligned bytes. Tensor loads whose swizzle has the width of a row write this layout, and
// products of warp groups read both factors in it.
template <int kRow>
__device__ __forceinline__ uint64_t factor_descriptor(uint32_t address) {
    static_assert(kRow == 32 || kRow == 64 || kRow == 128);
    constexpr uint64_t kGroupStride = 8 * kRow, kSwizzle = kRow == 128 ? 1 : kRow == 64 ? 2 : 3;
    return (address & 0x3FFFF) >> 4 | 1ull << 16 | (kGroupStride >> 4) << 32 | kSwizzle << 62;
}

// A block: one warp group that loads, and those that multiply.
namespace warp_groups {

constexpr int kTileRows = 8, kTileColumns = 16;
constexpr int kConsumers = 2;
constexpr int kGroupThreads = 128;
constexpr int kThreads = kGroupThreads * (1 + kConsumers);

// The first address for boxes from `address` on: groups of 128-byte rows have 1024 aligned bytes.
__device__ __forceinline__ uint32_t aligned(uint32_t address) {
    return (address + 1023) / 1024 * 1024;
}

}  // namespace warp_groups

#ifdef FASTDEN_EMULATED

using emulator::barrier_arrive;
using emulator::barrier_expect;
using emulator::barrier_init;
using emulator::barrier_wait;
using emulator::cluster_rank;
using emulator::group_commit;
using emulator::meet_at;
using emulator::meet_cluster;
using emulator::tensor_store_commit;

inline void barrier_init_done() {}
inline bool elected() {
    return emulator::elected();
}
inline int uniform_warp() {
    return threadIdx.x / 32;
}
inline void make_writes_visible() {}
inline void tensor_load_4d(uint32_t target, const CUtensorMap& map, uint32_t barrier, int c, int x, int y, int n) {
    const int corner[] = {c, x, y, n};
    emulator::tensor_load(target, map, barrier, corner, 1u << cluster_rank());
}
inline void tensor_load_2d(uint32_t target, const CUtensorMap& map, uint32_t barrier, int c, int row, unsigned ranks) {
    const int corner[] = {c, row};
    emulator::tensor_load(target, map, barrier, corner, ranks);
}
inline void tensor_store_4d(const CUtensorMap& map, uint32_t source, int c, int x, int y, int n) {
    const int corner[] = {c, x, y, n};
    emulator::tensor_store(map, source, corner);
}
template <int kPending>
void tensor_store_wait_read() {
    emulator::tensor_store_wait(kPending);
}
template <int kSums>
void group_fence(float (&)[kSums]) {}
template <int kValues, typename Value>
void keep_in_place(Value (&)[kValues]) {}
template <typename T, int kSums>
void group_multiply_add(float (&sums)[kSums], uint64_t a, uint64_t b, bool add) {
    emulator::group_multiply_add(sums, 2 * kSums, a, b, add, emulator::factor<T>());
}
template <typename T>
void group_multiply_add(float (&sums)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
    emulator::group_multiply_add(sums, 64, a, b, add, emulator::factor<T>());
}
template <int kPending, int kSums>
void group_wait(float (&)[kSums]) {
    emulator::group_wait(kPending);
}
template <int kRegisters>
void registers_give() {}
template <int kRegisters>
void registers_take() {}

#else

// A barrier counts arrivals and the bytes of tensor loads; its phases alternate between parity 0 and 1.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers visible to every thread of the cluster and to tensor loads, after meet_cluster.
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and announces the bytes of this phase.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier with the same address in block `rank` of the cluster. The scope is the default, the block:
// with .cluster, ptxas 13.0 adds a fence of the whole GPU before it. Only data that this thread has written would need
// it.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Waits until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// True in exactly one thread of the warp; all threads must call it. The compiler knows that one thread runs what
// follows.
__device__ __forceinline__ bool elected() {
    uint32_t chosen;
    asm volatile(
        "{\n.reg .pred chosen;\n"
        "elect.sync _|chosen, 0xFFFFFFFF;\n"
        "selp.u32 %0, 1, 0, chosen;\n}\n"
        : "=r"(chosen));
    return chosen != 0;
}

// The warp's number in the block, as a value that the compiler knows to be the same in all its threads.
__device__ __forceinline__ int uniform_warp() {
    return __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);
}

// Waits for every thread of the cluster. The threads of a warp meet first, because the aligned form requires it.
__device__ __forceinline__ void meet_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Waits for `count` threads of the block at the barrier with this number, 1 to 15.
__device__ __forceinline__ void meet_at(int barrier, int count) {
    __syncwarp();
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Loads a box. Its first element has the given coordinates, channels first. Elements outside the tensor are zeros. The
// barrier counts the bytes of the box.
__device__ __forceinline__ void tensor_load_4d(uint32_t target, const CUtensorMap& map, uint32_t barrier, int c, int x,
                                               int y, int n) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(c), "r"(x), "r"(y), "r"(n)
        : "memory");
}

// Loads a box into every block of the cluster whose bit is set in `ranks`, at the same addresses.
__device__ __forceinline__ void tensor_load_2d(uint32_t target, const CUtensorMap& map, uint32_t barrier, int c,
                                               int row, unsigned ranks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4}], [%2], %5;" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(c), "r"(row), "h"(static_cast<uint16_t>(ranks))
        : "memory");
}

__device__ __forceinline__ void tensor_store_4d(const CUtensorMap& map, uint32_t source, int c, int x, int y, int n) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(source), "r"(c), "r"(x), "r"(y), "r"(n)
                 : "memory");
}

__device__ __forceinline__ void tensor_store_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all groups of this thread's stores, except the last kPending, have read shared memory.
template <int kPending>
__device__ __forceinline__ void tensor_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Makes this thread's writes to shared memory visible to tensor stores and to products of warp groups.
__device__ __forceinline__ void make_writes_visible() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// For the compiler, products are finished when they are issued. Without these functions, it could move or copy the
// registers of sums, or those of a factor, while the products are still running.
template <int kSums>
__device__ __forceinline__ void keep_in_place(float (&sums)[kSums]) {
#pragma unroll
    for (int index = 0; index < kSums; ++index) asm volatile("" : "+f"(sums[index])::"memory");
}
template <int kValues>
__device__ __forceinline__ void keep_in_place(uint32_t (&values)[kValues]) {
#pragma unroll
    for (int index = 0; index < kValues; ++index) asm volatile("" : "+r"(values[index])::"memory");
}

// Call this before products into `sums`, if other code has written `sums` since the last products.
template <int kSums>
__device__ __forceinline__ void group_fence(float (&sums)[kSums]) {
    keep_in_place(sums);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void group_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most the last kPending groups of this warp group's products are still running. `sums` are those of the
// groups that it waits for.
template <int kPending, int kSums>
__device__ __forceinline__ void group_wait(float (&sums)[kSums]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    keep_in_place(sums);
}

// Set the number of registers for each thread of this warp group; the block shares its registers among its warp groups.
template <int kRegisters>
__device__ __forceinline__ void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// sums (64 x 256 over the four warps) = a (64 x 16) b (16 x 256), or += if `add`; both factors are in shared memory.
template <typename T>
__device__ __forceinline__ void group_multiply_add(float (&sums)[128], uint64_t a, uint64_t b, bool add);

// The same for 128 columns and 32 values of 8 bits: sums (64 x 128) = a (64 x 32) b (32 x 128).
template <typename T>
__device__ __forceinline__ void group_multiply_add(float (&sums)[64], uint64_t a, uint64_t b, bool add);

// The same for 64 columns: sums (64 x 64) = a (64 x 16) b (16 x 64).
template <typename T>
__device__ __forceinline__ void group_multiply_add(float (&sums)[32], uint64_t a, uint64_t b, bool add);

// The same with a in registers: each warp has 16 rows, as load_matrices and multiply_add have them.
template <typename T>
__device__ __forceinline__ void group_multiply_add(float (&sums)[32], const uint32_t (&a)[4], uint64_t b, bool add);

// The operands of a thread's 128 sums, and their names in the instruction.
#define FASTDEN_SUMS_OF_4(i) "+f"(sums[i]), "+f"(sums[(i) + 1]), "+f"(sums[(i) + 2]), "+f"(sums[(i) + 3])
#define FASTDEN_SUMS_OF_16(i) \
    FASTDEN_SUMS_OF_4(i), FASTDEN_SUMS_OF_4((i) + 4), FASTDEN_SUMS_OF_4((i) + 8), FASTDEN_SUMS_OF_4((i) + 12)
#define FASTDEN_SUMS                                                                               \
    FASTDEN_SUMS_OF_16(0), FASTDEN_SUMS_OF_16(16), FASTDEN_SUMS_OF_16(32), FASTDEN_SUMS_OF_16(48), \
        FASTDEN_SUMS_OF_16(64), FASTDEN_SUMS_OF_16(80), FASTDEN_SUMS_OF_16(96), FASTDEN_SUMS_OF_16(112)
#define FASTDEN_32_SUM_NAMES                                                 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTDEN_64_SUM_NAMES                                                             \
    FASTDEN_32_SUM_NAMES                                                                 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTDEN_SUM_NAMES                                                                          \
    FASTDEN_64_SUM_NAMES                                                                           \
    ", "                                                                                           \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTDEN_GROUP_MULTIPLY_ADD(TYPE, NAME)                                                                       \
    template <>                                                                                                      \
    __device__ __forceinline__ void group_multiply_add<TYPE>(float (&sums)[128], uint64_t a, uint64_t b, bool add) { \
        asm volatile(                                                                                                \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"                                                        \
            "wgmma.mma_async.sync.aligned.m64n256k16.f32." NAME "." NAME " {" FASTDEN_SUM_NAMES                      \
            "}, %128, %129, add, 1, 1, 0, 0;\n}\n"                                                                   \
            : FASTDEN_SUMS                                                                                           \
            : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                           \
    }

template <>
__device__ __forceinline__ void group_multiply_add<__nv_fp8_e4m3>(float (&sums)[64], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" FASTDEN_64_SUM_NAMES "}, %64, %65, add, 1, 1;\n}\n"
        : FASTDEN_SUMS_OF_16(0), FASTDEN_SUMS_OF_16(16), FASTDEN_SUMS_OF_16(32), FASTDEN_SUMS_OF_16(48)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

#define FASTDEN_32_SUMS FASTDEN_SUMS_OF_16(0), FASTDEN_SUMS_OF_16(16)
#define FASTDEN_GROUP_MULTIPLY_ADD_64(TYPE, NAME)                                                                   \
    template <>                                                                                                     \
    __device__ __forceinline__ void group_multiply_add<TYPE>(float (&sums)[32], uint64_t a, uint64_t b, bool add) { \
        asm volatile(                                                                                               \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"                                                        \
            "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" FASTDEN_32_SUM_NAMES                   \
            "}, %32, %33, add, 1, 1, 0, 0;\n}\n"                                                                    \
            : FASTDEN_32_SUMS                                                                                       \
            : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                          \
    }                                                                                                               \
    template <>                                                                                                     \
    __device__ __forceinline__ void group_multiply_add<TYPE>(float (&sums)[32], const uint32_t (&a)[4], uint64_t b, \
                                                             bool add) {                                            \
        asm volatile(                                                                                               \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                                        \
            "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" FASTDEN_32_SUM_NAMES                   \
            "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}\n"                                                      \
            : FASTDEN_32_SUMS                                                                                       \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));                      \
    }

FASTDEN_GROUP_MULTIPLY_ADD(__nv_bfloat16, "bf16")
FASTDEN_GROUP_MULTIPLY_ADD(__half, "f16")
FASTDEN_GROUP_MULTIPLY_ADD_64(__nv_bfloat16, "bf16")
FASTDEN_GROUP_MULTIPLY_ADD_64(__half, "f16")

#undef FASTDEN_GROUP_MULTIPLY_ADD
#undef FASTDEN_GROUP_MULTIPLY_ADD_64
#undef FASTDEN_SUM_NAMES
#undef FASTDEN_64_SUM_NAMES
#undef FASTDEN_32_SUM_NAMES
#undef FASTDEN_SUMS
#undef FASTDEN_32_SUMS
#undef FASTDEN_SUMS_OF_16
#undef FASTDEN_SUMS_OF_4

#endif

// A ring of stages. The loading side and the multiplying side each have their own position in it.
template <int kStages, int kBytes>
struct Ring {
    uint32_t base, barriers;
    int stage = 0;
    uint32_t parity = 0;

    __device__ uint32_t address() const { return base + stage * kBytes; }
    __device__ uint32_t full() const { return barriers + 8 * stage; }
    __device__ uint32_t empty() const { return barriers + 8 * (kStages + stage); }
    // `readers`: number of arrivals that make a stage empty.
    __device__ void initialise(int readers) const {
        for (int index = 0; index < kStages; ++index) {
            barrier_init(barriers + 8 * index, 1);  // full: the thread that loads
            barrier_init(barriers + 8 * (kStages + index), readers);
        }
    }
    __device__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

}  // namespace fastden
