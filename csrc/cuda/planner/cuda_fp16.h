// Stands in for the toolkit's header: the planner needs a half's name and size alone.
#pragma once

struct __half {
  unsigned short bits;
  __half() = default;
  explicit __half(float) : bits(0) {}
  explicit operator float() const { return 0.0f; }
};
