// csrc/cuda/hopper.h on the emulator.
#pragma once

#include "emulated_instructions.h"

namespace ffattr::cuda {

struct TensorMap {
  const uint8_t* base;
  int element_bytes;
  uint64_t sizes[3], strides[3];  // strides in bytes
  uint32_t box[3];
};

inline TensorMap tensor_map(const void* base, int element_bytes, const uint64_t (&sizes)[3],
                            const uint64_t (&strides)[2], const uint32_t (&box)[3]) {
  const auto refuse = [](bool wrong, const char* why) {
    if (wrong) emulator::fail(std::string("the driver would refuse a tensor: ") + why);
  };
  refuse(reinterpret_cast<uintptr_t>(base) % 16 != 0, "its address");
  refuse(strides[0] % 16 != 0 || strides[1] % 16 != 0, "its strides");
  refuse(box[0] * element_bytes != 128, "the rows of its box");
  refuse(box[1] > 256 || box[2] > 256, "the size of its box");
  refuse(sizes[0] == 0 || sizes[1] == 0 || sizes[2] == 0, "its sizes");
  return {static_cast<const uint8_t*>(base),
          element_bytes,
          {sizes[0], sizes[1], sizes[2]},
          {static_cast<uint64_t>(element_bytes), strides[0], strides[1]},
          {box[0], box[1], box[2]}};
}

// Barriers.

inline void complete(emulator::Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
}
inline emulator::Barrier& barrier_of(emulator::Block& block, uint32_t address) {
  block.at(address, 8, 8);
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end()) emulator::fail("a barrier that nobody has initialised");
  return found->second;
}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  emulator::block().at(barrier, 8, 8);
  emulator::block().barriers[barrier] = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0};
}
inline void fence_barrier_init() {}
inline void arrive(emulator::Barrier& barrier) {
  if (--barrier.pending < 0) emulator::fail("more arrivals at a barrier than it counts");
  complete(barrier);
}
inline void barrier_expect(uint32_t address, uint32_t bytes) {
  emulator::Barrier& barrier = barrier_of(emulator::block(), address);
  barrier.bytes += bytes;
  arrive(barrier);
}
inline void barrier_wait(uint32_t address, uint32_t parity) {
  const emulator::Barrier& barrier = barrier_of(emulator::block(), address);
  const std::function<bool()> over = [&] { return barrier.phase % 2 != parity; };
  emulator::machine().wait(over);
}
inline void barrier_arrive(uint32_t address, uint32_t rank) {
  emulator::Block& block = emulator::machine().blocks[rank];
  if (block.running == 0) emulator::fail("an arrival at a block that has ended");
  arrive(barrier_of(block, address));
}

inline void meet_later(int id, int threads) {
  emulator::Group& group = emulator::block().named[id];
  group.size = threads;
  if (++group.arrived < threads) return;
  group.arrived = 0;
  ++group.generation;
}
inline void meet(int id, int threads) {
  const emulator::Group& group = emulator::block().named[id];
  const uint64_t generation = group.generation;
  meet_later(id, threads);
  const std::function<bool()> passed = [&] { return group.generation != generation; };
  emulator::machine().wait(passed);
}

inline uint32_t cluster_rank() { return emulator::block().rank; }
inline void cluster_sync() {
  const int lane = static_cast<int>(cluster_rank() * blockDim.x + emulator::thread());
  emulator::machine().together(emulator::machine().everyone, "barrier.cluster", lane, nullptr, [](auto&) {});
}
inline void fence_shared() {}
template <int Count>
void give_registers() {}
template <int Count>
void take_registers() {}

// TMA.

inline uint32_t swizzled_address(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void load_box_to_all(uint32_t to, const TensorMap* map, uint32_t barrier, uint16_t blocks, int x, int y, int z) {
  emulator::Machine& machine = emulator::machine();
  if (to % 1024 != 0) emulator::fail("TMA writes to an address whose swizzle is not that of products");
  for (unsigned rank = 0; rank < machine.blocks.size(); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    emulator::Block& block = machine.blocks[rank];
    machine.transfers.push_back([=, &block, map = *map] {
      if (block.running == 0) emulator::fail("TMA writes to a block that has ended");
      uint32_t address = to;
      for (uint32_t k = 0; k < map.box[2]; ++k)
        for (uint32_t j = 0; j < map.box[1]; ++j)
          for (uint32_t i = 0; i < map.box[0]; ++i, address += map.element_bytes) {
            const int64_t at[3] = {x + int64_t{i}, y + int64_t{j}, z + int64_t{k}};
            const uint8_t* from = map.base;
            bool inside = true;
            for (int axis = 0; axis < 3; ++axis) {
              inside &= at[axis] >= 0 && at[axis] < static_cast<int64_t>(map.sizes[axis]);
              from += at[axis] * static_cast<int64_t>(map.strides[axis]);
            }
            uint8_t* place = block.at(swizzled_address(address), map.element_bytes, map.element_bytes);
            inside ? std::memcpy(place, from, map.element_bytes) : std::memset(place, 0, map.element_bytes);
          }
      emulator::Barrier& announced = barrier_of(block, barrier);
      announced.bytes -= address - to;
      complete(announced);
    });
  }
}
inline void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y, int z) {
  load_box_to_all(to, map, barrier, static_cast<uint16_t>(1 << cluster_rank()), x, y, z);
}

inline uint32_t pack_float8(float a, float b, float c, float d) {
  return from_float<Float8>(a).bits | from_float<Float8>(b).bits << 8 | from_float<Float8>(c).bits << 16 |
         static_cast<uint32_t>(from_float<Float8>(d).bits) << 24;
}

// Products of a warpgroup: run when they are waited for.

inline uint64_t operand(uint32_t address, uint32_t leading, uint32_t stride) {
  if (address % 16 != 0 || leading % 16 != 0 || stride % 16 != 0) emulator::fail("an operand that is not aligned");
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

template <class Execute>
void warpgroup(const char* instruction, void* argument, const Execute& execute) {
  const unsigned thread = emulator::thread();
  emulator::machine().together(emulator::block().warpgroups[thread / 128], instruction, thread % 128, argument,
                               execute);
}
inline auto& products() { return emulator::block().products[emulator::thread() / 128]; }

inline void multiply_fence() {
  warpgroup("wgmma.fence", nullptr, [](auto&) {});
}
inline void multiply_commit() {
  warpgroup("wgmma.commit_group", nullptr, [](auto&) { products().emplace_back(); });
}
inline void multiply_wait() {
  emulator::machine().wait_as_long_as_possible();
  warpgroup("wgmma.wait_group", nullptr, [](auto&) {
    if (!products().back().empty()) emulator::fail("products that are waited for, but not committed");
    for (const auto& group : products())
      for (const auto& product : group) product();
    products().assign(1, {});
  });
}

template <int Count>
void finished(float (&)[Count]) {}

// Element (row, at) of an operand in shared memory: `of_depth` if its rows in memory are of its depth.
template <class T>
float shared_element(const emulator::Block& block, uint64_t descriptor, bool of_depth, int depth, int column) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4,
                 stride = (descriptor >> 32 & 0x3FFF) << 4, bytes = sizeof(T);
  if (descriptor >> 62 != 1) emulator::fail("an operand without the swizzle of 128 bytes");
  const uint32_t offset = of_depth ? column / 8 * stride + column % 8 * 128 + depth * bytes
                                   : column / 64 * leading + depth / 8 * stride + depth % 8 * 128 + column % 64 * bytes;
  T value;
  std::memcpy(&value, block.at(swizzled_address(start + offset), bytes, bytes), bytes);
  return to_float(value);
}

struct WarpgroupOperands {
  float* c;
  const uint32_t* left;
  uint64_t left_shared, right;
  int add;
};

// `Columns` of 32 bytes of depth, which the right operand has its rows of where `of_depth`.
template <class T, int Columns>
void multiply_warpgroup(const WarpgroupOperands& mine, bool of_depth) {
  constexpr int kDepth = 32 / sizeof(T);
  warpgroup("wgmma.mma_async", const_cast<WarpgroupOperands*>(&mine), [=](const std::vector<void*>& all) {
    std::vector<WarpgroupOperands> given;
    for (const void* one : all) given.push_back(*static_cast<const WarpgroupOperands*>(one));
    products().back().push_back([=, &block = emulator::block()] {
      static thread_local float left[64][kDepth], right[kDepth][Columns];
      for (int thread = 0; thread < 128; ++thread) {
        const WarpgroupOperands& from = given[thread];
        const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
        if (from.right != given[0].right || from.add != given[0].add) emulator::fail("threads that disagree on wgmma");
        if (from.left == nullptr) {
          for (int k = t; k < kDepth; k += 4)
            for (int r = row; r <= row + 8; r += 8) left[r][k] = shared_element<T>(block, from.left_shared, true, k, r);
          continue;
        }
        constexpr int kWord = 4 / sizeof(T);
        for (int i = 0; i < 4; ++i)
          for (int e = 0; e < kWord; ++e) {
            using Bits = decltype(T::bits);
            const T value{static_cast<Bits>(from.left[i] >> (8 * sizeof(T) * e))};
            left[row + i % 2 * 8][i / 2 * kDepth / 2 + kWord * t + e] = to_float(value);
          }
      }
      for (int k = 0; k < kDepth; ++k)
        for (int n = 0; n < Columns; ++n) right[k][n] = shared_element<T>(block, given[0].right, of_depth, k, n);
      for (int row = 0; row < 64; ++row) {
        float sums[Columns] = {};
        for (int k = 0; k < kDepth; ++k)
          for (int n = 0; n < Columns; ++n) sums[n] += left[row][k] * right[k][n];
        for (int n = 0; n < Columns; ++n) {
          const WarpgroupOperands& to = given[row / 16 * 32 + row % 8 * 4 + n % 8 / 2];
          float& c = to.c[n / 8 * 4 + row / 8 % 2 * 2 + n % 2];
          c = cut_off((to.add ? static_cast<double>(c) : 0) + sums[n]);
        }
      }
    });
  });
}

template <class T, int Registers>
void multiply_shared(T, float (&c)[Registers], uint64_t left, uint64_t right, int add) {
  multiply_warpgroup<T, 2 * Registers>({c, nullptr, left, right, add}, false);
}
template <class T, int Registers>
void multiply_registers(T, float (&c)[Registers], const uint32_t* left, uint64_t right, int add) {
  multiply_warpgroup<T, 2 * Registers>({c, left, 0, right, add}, sizeof(T) == 1);
}

}  // namespace ffattr::cuda
