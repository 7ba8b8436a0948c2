// Part of lowrank_body.h: how rows are divided.
#pragma once

#include "lowrank_vec.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

constexpr int64_t kCache = 384 << 10;  // bytes of x that are read twice while a core's second-level cache holds them
constexpr int64_t kWorth = 1 << 15;    // numbers below which a second thread costs more than it saves
constexpr int64_t kRows = 16;          // rows and columns that are written at a time: with the factor's columns they
constexpr int64_t kColumns = 256;      // stay in the first-level cache

int parts_for(int64_t rows, int64_t cols, int threads) {
  const int64_t worth = most(1, rows * cols / kWorth);
  return static_cast<int>(least(least(most(1, threads), worth), most(1, rows)));
}

struct Range {
  int64_t begin, end;
};

// the rows of one part, a multiple of four but for the last
Range range_of(int64_t rows, int parts, int part) {
  const int64_t step = ((rows + parts - 1) / parts + 3) / 4 * 4;
  return {least(rows, part * step), least(rows, (part + 1) * step)};
}

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
