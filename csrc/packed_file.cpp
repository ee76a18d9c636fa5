#include "packed_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace relufy {
namespace {

static_assert(std::endian::native == std::endian::little, "packed files are little-endian");

constexpr char kMagic[8] = {'R', 'E', 'L', 'U', 'F', 'Y', '\x1a', '\n'};
constexpr size_t kAlignment = 64;
constexpr size_t kMaxDimension = size_t{1} << 31;  // keeps every product of two dimensions in 64 bits
constexpr uint32_t kF32 = 1;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t header_crc;  // of the first header_bytes, with this field zero
  uint64_t header_bytes;
  uint64_t file_bytes;
  uint32_t num_numbers;
  uint32_t num_tensors;
  char reserved[24];
};
static_assert(sizeof(Header) == 64);

struct NumberRecord {
  char name[56];
  double value;
};
static_assert(sizeof(NumberRecord) == 64);

struct TensorRecord {
  char name[64];
  uint32_t dtype;
  uint32_t layout;
  uint64_t rows, columns, stride;
  uint64_t offset, bytes;
  char reserved[16];
};
static_assert(sizeof(TensorRecord) == 128);

std::string name_of(const char* name, size_t capacity) { return std::string(name, strnlen(name, capacity)); }

// How many floats a tensor takes by its own description; only called with dimensions up to kMaxDimension.
uint64_t floats_needed(const TensorRecord& r) {
  switch (static_cast<Layout>(r.layout)) {
    case Layout::columns:
      return r.columns * r.stride;
    case Layout::bundle:
      return r.rows * 2 * r.stride;
    default:
      return r.rows * r.stride;
  }
}

bool is_consistent(const TensorRecord& r) {
  if (r.rows == 0 || r.columns == 0 || r.rows > kMaxDimension || r.columns > kMaxDimension) return false;
  auto layout = static_cast<Layout>(r.layout);
  if (layout == Layout::vector && r.rows != 1) return false;
  if (r.stride != padded(layout == Layout::columns ? r.rows : r.columns)) return false;
  return r.bytes == floats_needed(r) * sizeof(float);
}

}  // namespace

uint32_t crc32(const unsigned char* data, size_t size, uint32_t crc) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  crc = ~crc;
  for (size_t i = 0; i < size; ++i) crc = table[(crc ^ data[i]) & 0xFF] ^ (crc >> 8);
  return ~crc;
}

PackedFile::PackedFile(const std::string& path) : path_(path) {
  int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail(std::string("can't be opened: ") + std::strerror(errno));
  struct stat status{};
  bool readable = fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
  size_ = readable ? static_cast<size_t>(status.st_size) : 0;
  void* mapped =
      size_ >= sizeof(Header) ? mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor, 0) : MAP_FAILED;
  close(descriptor);
  if (mapped == MAP_FAILED) fail("is too short to be a packed file");
  base_ = static_cast<const unsigned char*>(mapped);
  try {
    parse();
  } catch (...) {
    munmap(mapped, size_);
    throw;
  }
}

PackedFile::~PackedFile() {
  if (base_) munmap(const_cast<unsigned char*>(base_), size_);
}

void PackedFile::fail(const std::string& what) const { throw FileError(path_ + ": " + what); }

void PackedFile::parse() {
  Header header;
  std::memcpy(&header, base_, sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) fail("is not a packed file of relufy");
  if (header.version != kFormatVersion)
    fail("has format version " + std::to_string(header.version) + ", this relufy reads version " +
         std::to_string(kFormatVersion) + "; pack the model again");
  if (header.file_bytes != size_)
    fail("is truncated or damaged: " + std::to_string(size_) + " bytes where " +
         std::to_string(header.file_bytes) + " were written");
  uint64_t tables = uint64_t{header.num_numbers} * sizeof(NumberRecord) +
                    uint64_t{header.num_tensors} * sizeof(TensorRecord);
  if (header.header_bytes > size_ || header.header_bytes % kAlignment != 0 ||
      header.header_bytes < sizeof(Header) + tables)
    fail("is damaged: its tables do not fit its header");
  uint32_t stored = header.header_crc;
  header.header_crc = 0;
  uint32_t crc = crc32(reinterpret_cast<unsigned char*>(&header), sizeof header);
  crc = crc32(base_ + sizeof header, header.header_bytes - sizeof header, crc);
  if (crc != stored) fail("is damaged: the checksum of its header does not match");

  const unsigned char* record = base_ + sizeof(Header);
  for (uint32_t i = 0; i < header.num_numbers; ++i, record += sizeof(NumberRecord)) {
    NumberRecord number;
    std::memcpy(&number, record, sizeof number);
    numbers_[name_of(number.name, sizeof number.name)] = number.value;
  }
  for (uint32_t i = 0; i < header.num_tensors; ++i, record += sizeof(TensorRecord))
    parse_tensor(record, header.header_bytes);
}

void PackedFile::parse_tensor(const unsigned char* bytes, size_t header_bytes) {
  TensorRecord record;
  std::memcpy(&record, bytes, sizeof record);
  std::string name = name_of(record.name, sizeof record.name);
  if (record.offset % kAlignment != 0 || record.offset < header_bytes || record.offset > size_ ||
      record.bytes > size_ - record.offset)
    fail("is damaged: the tensor " + name + " lies outside the file");
  if (static_cast<Layout>(record.layout) == Layout::raw) return;
  if (record.dtype != kF32 || record.layout > static_cast<uint32_t>(Layout::bundle))
    fail("holds the tensor " + name + " in a form that this relufy does not know");
  if (!is_consistent(record)) fail("is damaged: the shape of the tensor " + name + " makes no sense");
  tensors_[name] = Tensor{static_cast<Layout>(record.layout),
                          record.rows,
                          record.columns,
                          record.stride,
                          record.bytes,
                          reinterpret_cast<const float*>(base_ + record.offset)};
}

double PackedFile::number(const std::string& name) const {
  auto found = numbers_.find(name);
  if (found == numbers_.end()) fail("is damaged: it does not say " + name);
  if (!std::isfinite(found->second)) fail("is damaged: " + name + " is not a number");
  return found->second;
}

size_t PackedFile::whole(const std::string& name, size_t least, size_t most) const {
  double value = number(name);
  if (value != std::floor(value) || value < static_cast<double>(least) || value > static_cast<double>(most))
    fail("is damaged: " + name + " is " + std::to_string(value));
  return static_cast<size_t>(value);
}

const Tensor& PackedFile::tensor(const std::string& name, Layout layout, size_t rows, size_t columns) const {
  auto found = tensors_.find(name);
  if (found == tensors_.end()) fail("is damaged: it has no tensor " + name);
  const Tensor& t = found->second;
  if (t.layout != layout || t.rows != rows || t.columns != columns)
    fail("is damaged: the tensor " + name + " does not have the shape that the model needs");
  return t;
}

const Tensor& PackedFile::matrix(const std::string& name, size_t rows, size_t columns) const {
  auto found = tensors_.find(name);
  bool is_columns = found != tensors_.end() && found->second.layout == Layout::columns;
  return tensor(name, is_columns ? Layout::columns : Layout::rows, rows, columns);
}

}  // namespace relufy
