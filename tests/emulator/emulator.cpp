#include "emulator.h"

#include <cstdlib>
#include <stdexcept>

#include "machine.h"

namespace fastden::emulator {

Machine machine;
Counters counted;

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

namespace {

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
    // And in half of these the last one begun comes first: what is read without a wait of its own shows only so.
    const bool late = draw() % 2 == 0, newest = draw() % 2 == 0;
    size_t left = machine.fibres.size();
    while (left > 0) {
        if (!machine.background.empty() && (machine.ready.empty() || (!late && draw() % 64 == 0))) {
            if (!late || !newest) {
                std::swap(machine.background[draw() % machine.background.size()], machine.background.back());
            }
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

}  // namespace

Counters& counters() {
    return counted;
}

Position& position() {
    return machine.running->position;
}

// Of the thread that calls the operators.
thread_local bool has_context = false;

cudaError_t make_context_current() {
    has_context = true;
    return cudaSuccess;
}

bool context_is_current() {
    return has_context;
}

void run(dim3 grid, int threads, int shared_bytes, int cluster, const std::function<void()>& body) {
    has_context = true;
    if (shared_bytes > 227 << 10) throw std::runtime_error("more shared memory than a block may have");
    const char* seed = std::getenv("FASTDEN_EMULATOR_SEED");
    // Small numbers' first draws would be alike: multiplied, every seed's differ.
    if (seed != nullptr) machine.random = (std::strtoull(seed, nullptr, 10) * 2 + 1) * 0x9E3779B97F4A7C15;
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

int cluster_rank() {
    return self().block->rank;
}

bool elected() {
    meet_warp();
    return lane() == kWarp / 2;  // not the first, which code could take for granted
}

}  // namespace fastden::emulator

namespace fastden {

cudaError_t device_attribute(int* value, cudaDeviceAttr attribute) {
    const char* major = std::getenv("FASTDEN_EMULATED_MAJOR");
    const char* multiprocessors = std::getenv("FASTDEN_EMULATED_MULTIPROCESSORS");
    const char* shared = std::getenv("FASTDEN_EMULATED_SHARED_KIB");
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = multiprocessors != nullptr ? std::atoi(multiprocessors) : 2;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            *value = major != nullptr ? std::atoi(major) : 9;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = (shared != nullptr ? std::atoi(shared) : 228) << 10;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = 227 << 10;
            return cudaSuccess;
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace fastden
