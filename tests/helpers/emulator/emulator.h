// Runs CUDA kernels on a CPU, to test what they compute: every thread of a cluster is a fiber, and threads that must
// meet (a warp at a matrix instruction, a block at a barrier) wait for each other. Made for finding mistakes:
//  - what is asynchronous happens as late as the program allows, or at a random time: a missing wait reads garbage;
//  - shared memory begins as NaN, and accesses by address are checked;
//  - threads of a warp at different instructions, and threads that wait for nothing, are errors.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("emulator: " + what); }

// Threads that meet. The last one to come does what all came for.
struct Group {
  int size = 0, arrived = 0;
  uint64_t generation = 0;
  const char* instruction = nullptr;
  std::vector<void*> arguments;
};

struct Copy {
  uint8_t* to;
  const void* from;
  bool there;
};

struct Barrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
};

struct Block;

struct Fiber {
  ucontext_t context;
  jmp_buf here;
  bool started = false, done = false;
  const std::function<bool()>* until = nullptr;
  Block* block = nullptr;
  unsigned thread = 0;
  std::vector<std::vector<Copy>> copies{1};  // of the groups in flight; the last is not yet committed
};

struct Block {
  unsigned index = 0, rank = 0;  // in the grid, in the cluster
  unsigned running = 0;          // threads that have not ended
  std::vector<uint8_t> memory;
  uint8_t* shared = nullptr;
  uint32_t bytes = 0;
  Group all;
  std::vector<Group> warps, warpgroups;
  std::map<int, Group> named;
  std::map<uint32_t, Barrier> barriers;
  bool any = false, any_result = false;
  std::vector<std::vector<std::vector<std::function<void()>>>> products;  // of every warpgroup: groups of operations

  uint8_t* at(uint32_t address, uint32_t size, uint32_t alignment) const {
    if (address + static_cast<uint64_t>(size) > bytes)
      fail("shared address " + std::to_string(address) + " is outside");
    if (address % alignment != 0) fail("shared address " + std::to_string(address) + " is not aligned");
    return shared + address;
  }
};

struct Launch {
  unsigned grid, threads, shared_bytes, cluster = 1;
};

class Machine {
 public:
  std::vector<Block> blocks;
  std::vector<std::function<void()>> transfers;  // under way, in no order
  Group everyone;
  uint64_t still = 0;  // times that nothing else could go on
  int patient = 0;     // threads that wait for that
  Fiber* fiber = nullptr;

  Block& block() const { return *fiber->block; }

  template <class Kernel>
  void run(const Launch& launch, unsigned first_block, const Kernel& kernel) {
    prepare(launch, first_block);
    entry_ = [&] { kernel(); };
    size_t remaining = fibers_.size();
    while (remaining > 0) {
      bool moved = false;
      const size_t start = random() % fibers_.size();
      for (size_t i = 0; i < fibers_.size(); ++i) {
        Fiber& next = *fibers_[(start + i) % fibers_.size()];
        if (next.done || (next.until != nullptr && !(*next.until)())) continue;
        next.until = nullptr;
        moved = true;
        resume(next);
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
        if (next.done) --remaining, --next.block->running;
      }
      if (!transfers.empty() && (!moved || random() % 2 == 0)) {
        std::swap(transfers[random() % transfers.size()], transfers.back());
        const auto transfer = std::move(transfers.back());
        transfers.pop_back();
        transfer();
        moved = true;
      }
      if (!moved && patient > 0) {
        ++still;
        moved = true;
      }
      if (!moved) fail("the threads of block " + std::to_string(first_block) + " wait for each other");
    }
    if (!transfers.empty()) fail("a block ended before its transfers");
  }

  // Until nothing else can go on.
  void wait_as_long_as_possible() {
    const uint64_t before = still;
    const std::function<bool()> over = [&] { return still != before; };
    ++patient;
    wait(over);
    --patient;
  }

  void wait(const std::function<bool()>& until) {
    if (until()) return;
    fiber->until = &until;
    if (_setjmp(fiber->here) == 0) _longjmp(scheduler_, 1);
  }

  template <class Execute>
  void together(Group& group, const char* instruction, int lane, void* argument, const Execute& execute) {
    if (group.arrived == 0) group.instruction = instruction;
    if (std::strcmp(group.instruction, instruction) != 0)
      fail(std::string("threads that belong together are at ") + group.instruction + " and at " + instruction);
    group.arguments[lane] = argument;
    const uint64_t generation = group.generation;
    if (++group.arrived == group.size) {
      execute(group.arguments);
      group.arrived = 0;
      ++group.generation;
    } else {
      const std::function<bool()> passed = [&] { return group.generation != generation; };
      wait(passed);
    }
  }

 private:
  static constexpr size_t kStack = 128 << 10;

  void prepare(const Launch& launch, unsigned first_block) {
    const unsigned threads = launch.threads;
    const auto group_of = [](int size) {
      Group group;
      group.size = size;
      group.arguments.resize(size);
      return group;
    };
    blocks.assign(launch.cluster, {});
    transfers.clear();
    patient = 0;
    everyone = group_of(threads * launch.cluster);
    fibers_.resize(threads * launch.cluster);
    for (std::unique_ptr<Fiber>& fiber : fibers_)
      if (fiber == nullptr) fiber = std::make_unique<Fiber>();
    while (stacks_.size() < fibers_.size()) stacks_.push_back(std::make_unique_for_overwrite<char[]>(kStack));
    for (unsigned b = 0; b < launch.cluster; ++b) {
      Block& block = blocks[b];
      block.index = first_block + b;
      block.rank = b;
      block.running = threads;
      block.bytes = launch.shared_bytes;
      block.memory.assign(launch.shared_bytes + 1024, 0xFF);
      const auto start = reinterpret_cast<uintptr_t>(block.memory.data());
      block.shared = block.memory.data() + (1024 - start % 1024) % 1024;
      block.all = group_of(threads);
      block.warps.assign(threads / 32, group_of(32));
      block.warpgroups.assign(threads / 128, group_of(128));
      block.products.assign(threads / 128, {{}});
      for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = *fibers_[b * threads + t];
        fiber = Fiber{};
        fiber.block = &block;
        fiber.thread = t;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks_[b * threads + t].get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Machine::enter), 0);
      }
    }
    gridDim = {launch.grid, 1, 1};
    blockDim = {threads, 1, 1};
  }

  void resume(Fiber& next) {
    fiber = &next;
    threadIdx = {next.thread, 0, 0};
    blockIdx = {next.block->index, 0, 0};
    current() = this;
    if (_setjmp(scheduler_) != 0) return;
    if (next.started) _longjmp(next.here, 1);
    next.started = true;
    setcontext(&next.context);
  }

  static void enter() {
    Machine& machine = *current();
    try {
      machine.entry_();
    } catch (...) {
      machine.error_ = std::current_exception();
    }
    machine.fiber->done = true;
    _longjmp(machine.scheduler_, 1);
  }

  unsigned random() { return (random_ = random_ * 6364136223846793005ull + 1442695040888963407ull) >> 33; }

  uint64_t random_ = 1;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::function<void()> entry_;
  std::exception_ptr error_;
  jmp_buf scheduler_;

 public:
  static Machine*& current() {
    static thread_local Machine* machine = nullptr;
    return machine;
  }
};

inline Machine& machine() { return *Machine::current(); }
inline Block& block() { return machine().block(); }
inline unsigned thread() { return machine().fiber->thread; }
inline Group& warp() { return block().warps[thread() / 32]; }

// Of a block, in bytes: Hopper's, or what FFATTR_EMULATED_SHARED says.
inline int shared_limit() {
  const char* asked = std::getenv("FFATTR_EMULATED_SHARED");
  return asked == nullptr ? 227 << 10 : std::atoi(asked);
}

template <class Kernel, class... Arguments>
void launch(const Launch& shape, Kernel* kernel, const Arguments&... arguments) {
  if (shape.threads % 32 != 0 || shape.grid % shape.cluster != 0) fail("a launch of broken warps or clusters");
  static thread_local Machine machine;  // keeps its stacks
  for (unsigned first = 0; first < shape.grid; first += shape.cluster)
    machine.run(shape, first, [&] { kernel(arguments...); });
}

}  // namespace emulator
