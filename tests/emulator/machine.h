// What the emulator's files share: the emulated blocks and their threads, and how a thread waits.
#pragma once

#include <ucontext.h>

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulator.h"

namespace fastden::emulator {

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
    const uint32_t* left[kGroup];  // the first factor's registers; null where the factor is in shared memory
    int columns;
    uint64_t a, b;
    bool add;
    Factor factor;
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

extern Machine machine;
extern Counters counted;

inline uint64_t draw() {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return machine.random;
}

inline Fibre& self() {
    return *machine.running;
}

inline int lane() {
    return self().position.thread.x % kWarp;
}
inline Warp& warp() {
    return self().block->warps[self().position.thread.x / kWarp];
}
inline WarpGroup& group() {
    return self().block->groups[self().position.thread.x / kGroup];
}

// Ends the run with an error.
[[noreturn]] void fail(const std::string& what);

// Until something makes the running thread ready.
void sleep();

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

// Shared memory of a block, of the running thread's without one.
unsigned char* at(Block& block, uint32_t address, int bytes);
unsigned char* at(uint32_t address, int bytes);

// Rows of 128 bytes of which each 16-byte part lies at its place, XOR the row in groups of eight; or of 64 bytes, whose
// parts lie at their place XOR half the row, in groups of four; or of 32 bytes, XOR a quarter of the row, in groups of
// two.
inline uint32_t swizzled(uint32_t address, int row) {
    return address ^ ((address >> 7) & (row / 16 - 1)) << 4;
}

// Whether the thread that calls the operators has a context.
bool context_is_current();

// Copies what cp.async was to copy.
void finish(std::vector<Copy>& copies);

}  // namespace fastden::emulator
