// Stands in for the toolkit's header: the planner needs a bfloat16's name and size alone.
#pragma once

struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float) : bits(0) {}
  explicit operator float() const { return 0.0f; }
};
