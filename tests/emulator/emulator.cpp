#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

namespace fastden::emulator {
namespace {

constexpr int kWarp = 32;
constexpr int kGroup = 128;
constexpr size_t kStack = 128 << 10;
// Shared memory begins here, so that address 0 is nobody's.
constexpr uint32_t kBase = 1024;

struct Fibre;

// Threads wait here until `expected` have come; then all go on.
struct Meeting {
    std::vector<Fibre*> present;
};

struct MemoryBarrier {
    int count = 0, pending = 0;
    int64_t bytes = 0;  // announced and not yet there
    uint32_t phase = 0;
    std::vector<std::pair<Fibre*, uint32_t>> waiting;
};

struct Copy {
    unsigned char* target;
    const void* source;
};

struct Product {
    float* sums[kGroup];
    int columns;
    uint64_t a, b;
    bool add;
    float (*to_float)(uint16_t);
};

struct Warp {
    Meeting meeting;
    // What each lane brings to an instruction of the whole warp.
    const uint32_t* a[kWarp];
    uint32_t b[kWarp][2];
    float* sums[kWarp];
    uint32_t address[kWarp];
    uint32_t* values[kWarp];
};

struct WarpGroup {
    Meeting meeting;
    Product product;
    std::vector<Product> open;
    std::deque<std::vector<Product>> committed;
};

struct Store {
    const CUtensorMap* map;
    uint32_t source;
    int place[4];
};

struct Block {
    Index index;
    int rank = 0;
    int threads_left = 0;
    std::vector<unsigned char> storage;
    unsigned char* shared = nullptr;
    Meeting meeting;
    std::map<int, Meeting> numbered;
    std::map<uint32_t, MemoryBarrier> barriers;
    std::vector<Warp> warps;
    std::vector<WarpGroup> groups;
};

struct Fibre {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack;
    Position position;
    Block* block = nullptr;
    bool done = false;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> committed;
    std::vector<Store> stores;
    std::deque<std::vector<Store>> committed_stores;
};

struct Machine {
    ucontext_t scheduler;
    std::vector<std::unique_ptr<Fibre>> fibres;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<Fibre*> ready;
    std::vector<std::function<void()>> background;  // tensor loads under way
    Meeting cluster;
    Fibre* running = nullptr;
    const std::function<void()>* body = nullptr;
    std::string error;
    bool in_background = false;
    uint64_t random = 1;
    int shared_bytes = 0;
};

Machine machine;
Counters counted;

uint64_t draw() {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return machine.random;
}

Fibre& self() {
    return *machine.running;
}

[[noreturn]] void fail(const std::string& what) {
    Fibre& fibre = self();
    const Index block = fibre.position.block;
    machine.error = what + " (block " + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
                    std::to_string(block.z) + ", thread " + std::to_string(fibre.position.thread.x) + ")";
    if (machine.in_background) throw std::runtime_error(machine.error);
    for (;;) swapcontext(&fibre.context, &machine.scheduler);
}

void sleep() {
    Fibre& fibre = self();
    swapcontext(&fibre.context, &machine.scheduler);
}

// The last to come does `work` and wakes the others.
template <typename Work>
void meet(Meeting& meeting, int expected, Work work) {
    meeting.present.push_back(&self());
    if (static_cast<int>(meeting.present.size()) < expected) {
        sleep();
        return;
    }
    work();
    for (Fibre* fibre : meeting.present) {
        if (fibre != &self()) machine.ready.push_back(fibre);
    }
    meeting.present.clear();
}

int lane() {
    return self().position.thread.x % kWarp;
}
Warp& warp() {
    return self().block->warps[self().position.thread.x / kWarp];
}
WarpGroup& group() {
    return self().block->groups[self().position.thread.x / kGroup];
}

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

void entry() {
    try {
        (*machine.body)();
        Fibre& fibre = self();
        // The hardware finishes what is under way when a thread ends.
        for (auto& copies : fibre.committed) finish(copies);
        finish(fibre.open);
        if (!fibre.stores.empty() || !fibre.committed_stores.empty())
            fail("a thread ended before what it stores was read");
    } catch (const std::exception& error) {
        machine.error = error.what();
    }
    self().done = true;
    for (;;) sleep();
}

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

void run_cluster(dim3 grid, int threads, int cluster, unsigned first, const std::function<void()>& body) {
    machine.fibres.clear();
    machine.blocks.clear();
    machine.ready.clear();
    machine.background.clear();
    machine.cluster.present.clear();
    machine.body = &body;
    for (int rank = 0; rank < cluster; ++rank) {
        auto block = std::make_unique<Block>();
        const unsigned linear = first + rank;
        block->index = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
        block->rank = rank;
        block->threads_left = threads;
        block->storage.assign(machine.shared_bytes + 1024, 0xFF);  // a NaN in every type
        auto base = reinterpret_cast<uintptr_t>(block->storage.data());
        block->shared = block->storage.data() + (1024 - base % 1024) % 1024;
        block->warps.resize((threads + kWarp - 1) / kWarp);
        block->groups.resize((threads + kGroup - 1) / kGroup);
        for (int thread = 0; thread < threads; ++thread) {
            auto fibre = std::make_unique<Fibre>();
            fibre->position.thread.x = thread;
            fibre->position.block = block->index;
            fibre->position.threads = {static_cast<unsigned>(threads), 1, 1};
            fibre->position.blocks = {grid.x, grid.y, grid.z};
            fibre->block = block.get();
            fibre->stack.reset(new unsigned char[kStack]);
            getcontext(&fibre->context);
            fibre->context.uc_stack.ss_sp = fibre->stack.get();
            fibre->context.uc_stack.ss_size = kStack;
            fibre->context.uc_link = nullptr;
            makecontext(&fibre->context, entry, 0);
            machine.ready.push_back(fibre.get());
            machine.fibres.push_back(std::move(fibre));
        }
        machine.blocks.push_back(std::move(block));
    }
    // In every other cluster loads come when no thread can go on without: too early a read shows only so.
    const bool late = draw() % 2 == 0;
    size_t left = machine.fibres.size();
    while (left > 0) {
        if (!machine.background.empty() && (machine.ready.empty() || (!late && draw() % 64 == 0))) {
            std::swap(machine.background[draw() % machine.background.size()], machine.background.back());
            const auto work = std::move(machine.background.back());
            machine.background.pop_back();
            machine.running = machine.fibres.front().get();
            machine.in_background = true;
            work();
            machine.in_background = false;
            continue;
        }
        if (machine.ready.empty()) throw std::runtime_error("the threads wait for each other");
        std::swap(machine.ready[draw() % machine.ready.size()], machine.ready.back());
        machine.running = machine.ready.back();
        machine.ready.pop_back();
        swapcontext(&machine.scheduler, &machine.running->context);
        if (!machine.error.empty()) {
            const std::string error = std::move(machine.error);
            machine.error.clear();
            throw std::runtime_error(error);
        }
        if (machine.running->done) {
            --left;
            --machine.running->block->threads_left;
        }
    }
    if (!machine.background.empty()) throw std::runtime_error("a block ended before what it loads was there");
}

// What encode_tensor_map leaves in a CUtensorMap.
struct Map {
    const void* base;
    uint64_t sizes[4];
    uint64_t strides[4];  // bytes
    uint32_t box[4];
    int rank;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

Map decode(const CUtensorMap& map) {
    Map found;
    std::memcpy(&found, &map, sizeof found);
    return found;
}

// Rows of 128 bytes of which each 16-byte part lies at its place, XOR the row in groups of eight.
uint32_t swizzled(uint32_t address) {
    return address ^ ((address >> 7) & 7) << 4;
}

// `move(shared address, global pointer or null)` for every 16 bytes of a box.
template <typename Move>
void each_part(const Map& map, uint32_t shared, const int* place, Move move) {
    const int row = map.box[0] * 2;
    if (row != 128) fail("a box whose rows are not 128 bytes");
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
            const int64_t column = place[0] + 8 * part;
            const bool there = inside && column >= 0 && column < static_cast<int64_t>(map.sizes[0]);
            const char* global = static_cast<const char*>(map.base) + offset + 2 * column;
            move(swizzled(shared + index * row + 16 * part), there ? const_cast<char*>(global) : nullptr);
        }
    }
}

void execute(Block& block, const Product& product) {
    const auto value = [&](uint64_t descriptor, int row, int k) {
        if ((descriptor >> 62) != 1) fail("a descriptor without the 128-byte swizzle");
        if ((descriptor >> 49 & 7) != 0) fail("a descriptor with a base offset");
        const uint32_t start = (descriptor & 0x3FFF) << 4;
        const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
        uint16_t bits;
        std::memcpy(&bits, at(block, swizzled(start + row / 8 * stride + row % 8 * 128 + 2 * k), 2), 2);
        return product.to_float(bits);
    };
    std::vector<float> a(64 * 16), b(product.columns * 16);
    for (int row = 0; row < 64; ++row) {
        for (int k = 0; k < 16; ++k) a[row * 16 + k] = value(product.a, row, k);
    }
    for (int column = 0; column < product.columns; ++column) {
        for (int k = 0; k < 16; ++k) b[column * 16 + k] = value(product.b, column, k);
    }
    for (int thread = 0; thread < kGroup; ++thread) {
        for (int index = 0; index < product.columns / 2; ++index) {
            const int row = thread / kWarp * 16 + thread % kWarp / 4 + (index & 2 ? 8 : 0);
            const int column = index / 4 * 8 + thread % 4 * 2 + (index & 1);
            float sum = product.add ? product.sums[thread][index] : 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[column * 16 + k];
            product.sums[thread][index] = sum;
        }
    }
}

// All but the last `pending` groups of products.
void multiply_groups(Block& block, WarpGroup& all, int pending) {
    for (; static_cast<int>(all.committed.size()) > pending; all.committed.pop_front()) {
        for (const Product& product : all.committed.front()) execute(block, product);
    }
}

}  // namespace

Counters& counters() {
    return counted;
}

Position& position() {
    return machine.running->position;
}

void run(dim3 grid, int threads, int shared_bytes, int cluster, const std::function<void()>& body) {
    if (shared_bytes > 227 << 10) throw std::runtime_error("more shared memory than a block may have");
    const char* seed = std::getenv("FASTDEN_EMULATOR_SEED");
    if (seed != nullptr) machine.random = std::strtoull(seed, nullptr, 10) * 2 + 1;
    machine.shared_bytes = shared_bytes;
    machine.error.clear();
    machine.in_background = false;
    const unsigned blocks = grid.x * grid.y * grid.z;
    if (blocks % cluster != 0) throw std::runtime_error("a grid that is not made of whole clusters");
    for (unsigned first = 0; first < blocks; first += cluster) run_cluster(grid, threads, cluster, first, body);
}

void meet_warp() {
    meet(warp().meeting, kWarp, [] {});
}

void meet_block() {
    meet(self().block->meeting, self().position.threads.x, [] {});
}

void meet_cluster() {
    meet(machine.cluster, static_cast<int>(machine.fibres.size()), [] {});
}

void meet_at(int barrier, int count) {
    meet(self().block->numbered[barrier], count, [] {});
}

unsigned char* shared_memory() {
    return self().block->shared;
}

uint32_t shared_address(const void* pointer) {
    const auto offset = static_cast<const unsigned char*>(pointer) - self().block->shared;
    if (offset < 0 || offset > machine.shared_bytes) fail("not a pointer to shared memory");
    return kBase + static_cast<uint32_t>(offset);
}

void copy_async(uint32_t target, const void* source, bool valid) {
    if (target % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) fail("a copy that is not aligned");
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

void load_matrices(uint32_t* values, uint32_t address) {
    Warp& all = warp();
    all.address[lane()] = address;
    all.values[lane()] = values;
    meet(all.meeting, kWarp, [&] {
        ++counted.matrix_loads;
        for (int matrix = 0; matrix < 4; ++matrix) {
            int used[8] = {};
            for (int row = 0; row < 8; ++row) {
                const uint32_t start = all.address[matrix * 8 + row];
                if (start % 16 != 0) fail("a matrix row that is not aligned");
                const unsigned char* found = at(start, 16);
                bool again = false;
                for (int before = 0; before < row; ++before) again |= all.address[matrix * 8 + before] == start;
                if (!again) ++used[start / 16 % 8];
                for (int part = 0; part < 4; ++part) {
                    std::memcpy(&all.values[row * 4 + part][matrix], found + 4 * part, 4);
                }
            }
            counted.conflicts += *std::max_element(used, used + 8) - 1;
        }
    });
}

void multiply_add(float* sums, const uint32_t* a, uint32_t b0, uint32_t b1, float (*to_float)(uint16_t)) {
    Warp& all = warp();
    all.sums[lane()] = sums;
    all.a[lane()] = a;
    all.b[lane()][0] = b0;
    all.b[lane()][1] = b1;
    meet(all.meeting, kWarp, [&] {
        ++counted.multiplications;
        float left[16][16], right[16][8];
        const auto half = [&](uint32_t pair, int which) { return to_float(static_cast<uint16_t>(pair >> 16 * which)); };
        for (int thread = 0; thread < kWarp; ++thread) {
            const int row = thread / 4, column = thread % 4 * 2;
            for (int index = 0; index < 8; ++index) {
                const int down = index / 2 % 2 * 8, across = index / 4 * 8, odd = index % 2;
                left[row + down][column + across + odd] = half(all.a[thread][index / 2], odd);
            }
            for (int index = 0; index < 4; ++index) {
                right[column + index / 2 * 8 + index % 2][row] = half(all.b[thread][index / 2], index % 2);
            }
        }
        for (int thread = 0; thread < kWarp; ++thread) {
            for (int index = 0; index < 4; ++index) {
                const int row = thread / 4 + index / 2 * 8, column = thread % 4 * 2 + index % 2;
                float sum = all.sums[thread][index];
                for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
                all.sums[thread][index] = sum;
            }
        }
    });
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

int cluster_rank() {
    return self().block->rank;
}

bool elected() {
    meet_warp();
    return lane() == kWarp / 2;  // not the first, which code could take for granted
}

void encode_tensor_map(CUtensorMap* map, int rank, const void* base, const uint64_t* sizes, const uint64_t* strides,
                       const uint32_t* box) {
    Map made = {base, {}, {}, {}, rank};
    for (int dimension = 0; dimension < rank; ++dimension) {
        made.sizes[dimension] = sizes[dimension];
        made.strides[dimension] = dimension == 0 ? 2 : strides[dimension - 1];
        made.box[dimension] = box[dimension];
        if (made.strides[dimension] % 16 != 0 && dimension > 0) throw std::runtime_error("a stride off 16 bytes");
        if (box[dimension] > 256) throw std::runtime_error("a box of more than 256");
    }
    std::memcpy(map, &made, sizeof made);
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

void group_multiply_add(float* sums, int columns, uint64_t a, uint64_t b, bool add, float (*to_float)(uint16_t)) {
    WarpGroup& all = group();
    all.product.sums[self().position.thread.x % kGroup] = sums;
    meet(all.meeting, kGroup, [&] {
        all.product.columns = columns;
        all.product.a = a;
        all.product.b = b;
        all.product.add = add;
        all.product.to_float = to_float;
        all.open.push_back(all.product);
    });
}

void group_commit() {
    WarpGroup& all = group();
    Block& block = *self().block;
    meet(all.meeting, kGroup, [&] {
        all.committed.push_back(std::move(all.open));
        all.open.clear();
        // At once at times: a factor that is not there yet shows only so.
        if (draw() % 2 == 0) multiply_groups(block, all, 0);
    });
}

void group_wait(int pending) {
    WarpGroup& all = group();
    Block& block = *self().block;
    meet(all.meeting, kGroup, [&] { multiply_groups(block, all, pending); });
}

}  // namespace fastden::emulator

namespace fastden {

cudaError_t device_attribute(int* value, cudaDeviceAttr attribute) {
    const char* major = std::getenv("FASTDEN_EMULATED_MAJOR");
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = 2;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            *value = major != nullptr ? std::atoi(major) : 9;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = 227 << 10;
            return cudaSuccess;
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace fastden
