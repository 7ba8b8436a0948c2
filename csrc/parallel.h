#pragma once

namespace fastpeft {

// body(context, k) for k = 0 .. parts-1, at most `parts` at a time; returns when all are done. Which thread runs which part
// is not said: what must not depend on it (the order of a sum) belongs to the part.
//
// The threads are those of the OpenMP runtime that the process has already loaded (torch's): its workers spin for a while
// after each of torch's loops, and threads of our own would share their cores. Without such a runtime: std::thread.
void parallel(int parts, void (*body)(void* context, int part), void* context);

}  // namespace fastpeft
