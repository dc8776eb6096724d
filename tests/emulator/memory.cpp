// Shared memory and what fills and empties it in the background: cp.async, mbarriers, and TMA's boxes.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "machine.h"

namespace fastden::emulator {
namespace {

void check_barrier(MemoryBarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    ++barrier.phase;
    barrier.pending = barrier.count;
    auto waiting = std::move(barrier.waiting);
    barrier.waiting.clear();
    for (const auto& [fibre, parity] : waiting) {
        if ((barrier.phase & 1) == parity) {
            barrier.waiting.emplace_back(fibre, parity);
        } else {
            machine.ready.push_back(fibre);
        }
    }
}

MemoryBarrier& barrier_at(Block& block, uint32_t address) {
    if (block.threads_left == 0) fail("a barrier of a block that has ended");
    const auto found = block.barriers.find(address);
    if (found == block.barriers.end()) fail("a barrier that was not initialised");
    return found->second;
}

// What encode_tensor_map leaves in a CUtensorMap.
struct Map {
    const void* base;
    uint64_t sizes[4];
    uint64_t strides[4];  // bytes
    uint32_t box[4];
    int element;  // bytes
    int rank;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

Map decode(const CUtensorMap& map) {
    Map found;
    std::memcpy(&found, &map, sizeof found);
    return found;
}

// `move(shared address, global pointer or null)` for every 16 bytes of a box.
template <typename Move>
void each_part(const Map& map, uint32_t shared, const int* place, Move move) {
    const int row = map.box[0] * map.element;
    if (row != 32 && row != 64 && row != 128) fail("a box whose rows are not 32, 64 or 128 bytes");
    if (shared % 1024 != 0) fail("a box that is not aligned to 1024 bytes");
    const int rows =
        (map.rank > 1 ? map.box[1] : 1) * (map.rank > 2 ? map.box[2] : 1) * (map.rank > 3 ? map.box[3] : 1);
    for (int index = 0; index < rows; ++index) {
        int rest = index;
        bool inside = true;
        int64_t offset = 0;
        for (int dimension = 1; dimension < map.rank; ++dimension) {
            const int64_t coordinate = place[dimension] + rest % static_cast<int>(map.box[dimension]);
            rest /= static_cast<int>(map.box[dimension]);
            inside = inside && coordinate >= 0 && coordinate < static_cast<int64_t>(map.sizes[dimension]);
            offset += coordinate * static_cast<int64_t>(map.strides[dimension]);
        }
        for (int part = 0; part < row / 16; ++part) {
            const int64_t column = place[0] + 16 / map.element * part;
            const bool there = inside && column >= 0 && column < static_cast<int64_t>(map.sizes[0]);
            const char* global = static_cast<const char*>(map.base) + offset + map.element * column;
            move(swizzled(shared + index * row + 16 * part, row), there ? const_cast<char*>(global) : nullptr);
        }
    }
}

}  // namespace

unsigned char* at(Block& block, uint32_t address, int bytes) {
    if (address < kBase || address - kBase + bytes > static_cast<uint32_t>(machine.shared_bytes)) {
        fail("shared memory: address " + std::to_string(static_cast<int64_t>(address) - kBase) + " of " +
             std::to_string(machine.shared_bytes) + " bytes");
    }
    return block.shared + (address - kBase);
}

unsigned char* at(uint32_t address, int bytes) {
    return at(*self().block, address, bytes);
}

unsigned char* shared_memory() {
    return self().block->shared;
}

uint32_t shared_address(const void* pointer) {
    const auto offset = static_cast<const unsigned char*>(pointer) - self().block->shared;
    if (offset < 0 || offset > machine.shared_bytes) fail("not a pointer to shared memory");
    return kBase + static_cast<uint32_t>(offset);
}

void finish(std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
        if (copy.source != nullptr) {
            std::memcpy(copy.target, copy.source, 16);
        } else {
            std::memset(copy.target, 0, 16);
        }
    }
    copies.clear();
}

void copy_async(uint32_t target, const void* source, bool valid) {
    if (target % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) fail("a copy that is not aligned");
    // Of no bytes too: whether an address that is no pointer is looked at then, the PTX manual does not say. A negative
    // offset from a null pointer makes an address beyond the 47 bits of a process.
    const auto address = reinterpret_cast<uintptr_t>(source);
    if (address < 1 << 20 || address >> 47 != 0) fail("a copy from a null pointer");
    self().open.push_back({at(target, 16), valid ? source : nullptr});
    // At once at times: what is overwritten too early shows only so.
    if (draw() % 4 == 0) finish(self().open);
}

void copy_commit() {
    self().committed.push_back(std::move(self().open));
    self().open.clear();
}

void copy_wait(int pending) {
    auto& groups = self().committed;
    while (static_cast<int>(groups.size()) > pending) {
        finish(groups.front());
        groups.pop_front();
    }
}

void barrier_init(uint32_t barrier, int count) {
    at(barrier, 8);
    if (barrier % 8 != 0) fail("a barrier that is not aligned");
    MemoryBarrier& made = self().block->barriers[barrier];
    made = MemoryBarrier();
    made.count = made.pending = count;
}

void barrier_expect(uint32_t barrier, uint32_t bytes) {
    MemoryBarrier& found = barrier_at(*self().block, barrier);
    found.bytes += bytes;
    if (--found.pending < 0) fail("more arrivals at a barrier than it counts");
    check_barrier(found);
}

void barrier_arrive(uint32_t barrier, int rank) {
    MemoryBarrier& found = barrier_at(*machine.blocks[rank], barrier);
    if (--found.pending < 0) fail("more arrivals at a barrier than it counts");
    check_barrier(found);
}

void barrier_wait(uint32_t barrier, uint32_t parity) {
    MemoryBarrier& found = barrier_at(*self().block, barrier);
    if ((found.phase & 1) != parity) return;
    found.waiting.emplace_back(&self(), parity);
    sleep();
}

const char* encode_tensor_map(CUtensorMap* map, int element, int rank, const void* base, const uint64_t* sizes,
                              const uint64_t* strides, const uint32_t* box) {
    if (!context_is_current()) return "CUDA_ERROR_INVALID_CONTEXT";
    if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return "CUDA_ERROR_INVALID_VALUE";
    Map made = {base, {}, {}, {}, element, rank};
    for (int dimension = 0; dimension < rank; ++dimension) {
        made.sizes[dimension] = sizes[dimension];
        made.strides[dimension] = dimension == 0 ? element : strides[dimension - 1];
        made.box[dimension] = box[dimension];
        if (made.strides[dimension] % 16 != 0 && dimension > 0) return "CUDA_ERROR_INVALID_VALUE";
        if (box[dimension] > 256) return "CUDA_ERROR_INVALID_VALUE";
    }
    std::memcpy(map, &made, sizeof made);
    return nullptr;
}

void tensor_load(uint32_t target, const CUtensorMap& map, uint32_t barrier, const int* place, unsigned ranks) {
    const Map found = decode(map);
    std::vector<int> corner(place, place + found.rank);
    for (const auto& block : machine.blocks) {
        if ((ranks >> block->rank & 1) == 0) continue;
        Block* to = block.get();
        machine.background.push_back([=] {
            int64_t bytes = 0;
            each_part(found, target, corner.data(), [&](uint32_t address, const char* global) {
                unsigned char* place = at(*to, address, 16);
                if (global != nullptr) {
                    std::memcpy(place, global, 16);
                } else {
                    std::memset(place, 0, 16);
                }
                bytes += 16;
            });
            MemoryBarrier& waits = barrier_at(*to, barrier);
            waits.bytes -= bytes;
            check_barrier(waits);
        });
    }
}

void tensor_store(const CUtensorMap& map, uint32_t source, const int* place) {
    Store store = {&map, source, {}};
    std::copy(place, place + decode(map).rank, store.place);
    self().stores.push_back(store);
}

void tensor_store_commit() {
    self().committed_stores.push_back(std::move(self().stores));
    self().stores.clear();
}

void tensor_store_wait(int pending) {
    auto& groups = self().committed_stores;
    for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) {
        for (const Store& store : groups.front()) {
            each_part(decode(*store.map), store.source, store.place, [&](uint32_t address, char* global) {
                if (global != nullptr) std::memcpy(global, at(address, 16), 16);
            });
        }
    }
}

}  // namespace fastden::emulator
