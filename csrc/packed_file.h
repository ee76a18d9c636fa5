// Reads a packed file: a memory-mapped model of relufy's engine. docs/format.md describes the layout.
//
// Opening checks the header, the tables and the file's size, not the payload, so that it is instant. A
// damaged payload may change the text that is generated, never memory safety: nothing in it is used as a size
// or an index.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

namespace relufy {

constexpr uint32_t kFormatVersion = 1;

// What the user can act on: the file is missing, damaged, of another version, or not what its name says.
struct FileError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Layout : uint32_t {
  raw = 0,      // bytes for other readers: metadata, tokenizer, checksums
  vector = 1,   // one row
  rows = 2,     // a stored row holds one output's weights
  columns = 3,  // a stored row holds one input's weights to all outputs
  bundle = 4,   // a stored row holds one neuron: [up_i | down_i], each `stride` floats
};

struct Tensor {
  Layout layout;
  size_t rows, columns;  // of the matrix: outputs, inputs (bundle: neurons, hidden size)
  size_t stride;         // floats between stored rows
  size_t bytes;          // of the payload
  const float* data;
};

class PackedFile {
 public:
  explicit PackedFile(const std::string& path);
  ~PackedFile();
  PackedFile(const PackedFile&) = delete;
  PackedFile& operator=(const PackedFile&) = delete;

  // A number of the specification, which must be there. `whole` gives it as an integer in [least, most].
  double number(const std::string& name) const;
  size_t whole(const std::string& name, size_t least, size_t most) const;

  bool has_tensor(const std::string& name) const { return tensors_.count(name) > 0; }

  // A tensor that must be there with this layout and shape.
  const Tensor& tensor(const std::string& name, Layout layout, size_t rows, size_t columns) const;

  // A matrix in whichever of `rows` and `columns` it was packed.
  const Tensor& matrix(const std::string& name, size_t rows, size_t columns) const;

 private:
  void parse();
  void parse_tensor(const unsigned char* record, size_t header_bytes);
  [[noreturn]] void fail(const std::string& what) const;

  std::string path_;
  const unsigned char* base_ = nullptr;
  size_t size_ = 0;
  std::map<std::string, double> numbers_;
  std::map<std::string, Tensor> tensors_;
};

// CRC-32 as zlib computes it.
uint32_t crc32(const unsigned char* data, size_t size, uint32_t crc = 0);

}  // namespace relufy
