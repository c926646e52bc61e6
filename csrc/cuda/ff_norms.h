// The border between the operator ff_norms (checks, memory, which kernel) and its two kernels; no torch header.
#pragma once

#include "pairs.h"

namespace ffattr::cuda {

enum class Wide { float32, bfloat16, half, float8 };

// Every row begins at a multiple of 16 bytes, `pitch` elements after the one before, with zeros between.
struct WideOperands {
  // [S, K, H + 1, F], [S, N, F], [F, d], [K, H + 1, d]. For the second kernel two streams are one [K, H + 1, 2 F] and
  // [N, 2 F], in which the gates of 32 neurons are followed by their ups.
  const void *features, *slope, *down, *residual;
  int64_t feature_pitch, down_pitch, width_pitch;  // of features and slopes, of down, of residuals
  const float* down_scale;                         // [d] of float8, else null: `down` is [d, F] then
  int streams;
  Wide type;
};

// Calls visit<Streams>().
template <class Visitor>
auto with_streams(int streams, const Visitor& visit) {
  return streams == 1 ? visit.template operator()<1>() : visit.template operator()<2>();
}

// `blocks` of queries, of all sequences of the launch together.
void launch_direct_sm80(const Pairs& pairs, const WideOperands& from, int64_t blocks);
void launch_direct_sm90(const Pairs& pairs, const WideOperands& from, int64_t blocks);
// Whether the second one can, on this device: its heads leave shared memory for two stages.
bool fits_sm90(const Pairs& pairs, Wide type, int streams);

}  // namespace ffattr::cuda
