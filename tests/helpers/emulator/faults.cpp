// Kernels for the emulator that are right, and the same ones with a mistake that it has to find.
#include "hopper.h"
#include "launch.h"

using namespace ffattr::cuda;

namespace {

enum class Fault {
  none,
  wait,      // is left out
  barrier,   // is left out
  arrival,   // of one thread is left out
  kind,      // of barrier differs
  converge,  // not all of a warp
  outside,   // of shared memory
  alignment,
  bytes,  // announced are too few
};

// Every thread copies four numbers and passes on the first that its neighbour has copied.
void copy(const float* from, float* to, Fault fault) {
  const unsigned thread = threadIdx.x, next = (thread + 1) % blockDim.x;
  const uint32_t start = shared_address(dynamic_shared());
  copy_async(start + 16 * thread, from + 4 * thread, true);
  copy_commit();
  if (fault != Fault::wait) copy_wait<0>();
  if (fault == Fault::arrival && thread == 5) return;
  if (fault == Fault::kind && thread == 5)
    (void)__syncthreads_or(1);
  else if (fault != Fault::barrier)
    __syncthreads();
  const uint32_t distance = fault == Fault::outside ? 1 << 20 : fault == Fault::alignment ? 2 : 0;
  to[thread] = load_shared(start + 16 * next + distance);
}

// Every thread of a warp gets its neighbour's number.
void shuffle(const float* from, float* to, Fault fault) {
  const unsigned thread = threadIdx.x;
  uint32_t matrices[4];
  if (fault == Fault::converge && thread % 32 < 16) load_matrices(matrices, shared_address(dynamic_shared()));
  to[thread] = __shfl_xor_sync(~0u, from[thread ^ 1], 1);
}

// TMA fetches a box of 8 rows, of which every thread passes on two words.
void box(const float* from, float* to, Fault fault) {
  const unsigned thread = threadIdx.x;
  const uint32_t start = shared_address(dynamic_shared()), barrier = start + 1024;
  const TensorMap map = tensor_map(from, 2, {64, 8, 1}, {128, 1024}, {64, 8, 1});
  if (fault != Fault::arrival && thread == 0) barrier_init(barrier, 1);
  __syncthreads();
  if (thread == 0) {
    barrier_expect(barrier, fault == Fault::bytes ? 512 : 1024);
    load_box(start, &map, barrier, 0, 0, 0);
  }
  if (fault != Fault::wait) barrier_wait(barrier, 0);
  const unsigned row = thread / 32, word = thread % 32;
  to[thread] = load_shared(start + 128 * row + ((4 * word) ^ row << 4));
}

// Ones times ones, of a warpgroup.
void product(const float*, float* to, Fault fault) {
  const unsigned thread = threadIdx.x;
  auto* const operands = reinterpret_cast<uint16_t*>(dynamic_shared());
  for (unsigned i = thread; i < 8192 / 2; i += blockDim.x) operands[i] = 0x3F80;
  __syncthreads();
  const uint32_t start = shared_address(operands) + (fault == Fault::alignment ? 8 : 0);
  float c[16] = {};
  multiply_fence();
  multiply_shared(Bfloat16{}, c, operand(start, 16, 1024), operand(start, 4096, 1024), 0);
  if (fault != Fault::arrival) multiply_commit();
  if (fault != Fault::wait) multiply_wait();
  to[thread] = c[0];
}

}  // namespace

// Why the emulator refused, or nothing; `from` has 512 numbers, `to` 128.
extern "C" __attribute__((visibility("default"))) const char* run(const char* kernel, int fault, const float* from,
                                                                  float* to) {
  static thread_local std::string why;
  const std::string name = kernel;
  auto* const function = name == "copy" ? copy : name == "shuffle" ? shuffle : name == "box" ? box : product;
  why.clear();
  try {
    launch("faults", {1, 128, 9216, 1}, function, from, to, static_cast<Fault>(fault));
  } catch (const std::exception& error) {
    why = error.what();
  }
  return why.c_str();
}
