// Memory on 2 MiB pages where the kernel gives them: weights are read once per step, and with
// 4 KiB pages a step of a small model spends a good part of its time on translations.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paceline {

class HugeBuffer {
 public:
  HugeBuffer() = default;
  explicit HugeBuffer(size_t bytes);
  ~HugeBuffer();
  HugeBuffer(HugeBuffer&& other) noexcept;
  HugeBuffer& operator=(HugeBuffer&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Tells the kernel that mapped, clean file pages inside [data, data + bytes) are not needed soon.
void drop_file_pages(const void* data, size_t bytes);

}  // namespace paceline
