//! Tokens of a dump's SQL, read as a stream: what is held is one chunk of the input and the text of
//! one token, however long a statement or a value is.

use std::fmt;
use std::io::{self, Read};

/// Longest text of a token that is kept; none of the columns that are read is near it.
pub(super) const LONGEST: usize = 4096;
const CHUNK: usize = 1 << 16;
/// Bytes of a line comment that are looked at.
const COMMENT: usize = 64;
/// No server executes a comment for this version: `/*M!999999\- enable the sandbox mode */`.
const NEVER: u32 = 999_999;

/// Where in the dump, as an editor counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// From 1.
    pub line: u64,
    /// Bytes before it, unpacked.
    pub offset: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, byte {}", self.line, self.offset)
    }
}

/// A token; what it says is in [`Lexer::text`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    /// A bare word.
    Word,
    /// A name in backticks, or anything in double quotes.
    Quoted,
    /// A string, or a hexadecimal literal as the bytes it stands for.
    Text,
    /// A number as written, or a bit literal as a decimal one.
    Number,
    /// Any other byte.
    Sign(u8),
    /// The end of the dump.
    End,
}

/// Why there is no next token.
#[derive(Debug)]
pub(super) enum LexError {
    /// The input's own error.
    Io(io::Error),
    /// It ends in the middle of this.
    Cut(&'static str),
}

type Lexed<T> = Result<T, LexError>;

/// What its comments say of a dump.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Frame {
    /// There is the first line of a dump program.
    pub header: bool,
    /// There is its last line, and nothing after it.
    pub completed: bool,
}

/// Reads tokens from `input`.
pub(super) struct Lexer<R> {
    input: R,
    buf: Vec<u8>,
    at: usize,
    filled: usize,
    /// Bytes and newlines before `buf`.
    base: u64,
    lines: u64,
    ended: bool,
    /// How many comments that servers execute are open.
    executed: u32,
    /// Nothing but blanks and comments has been on this line so far.
    fresh_line: bool,
    /// The same, before the token that was read last.
    first_on_line: bool,
    /// Whether texts are wanted at all.
    pub keep: bool,
    /// The text of the last token, if wanted, up to [`LONGEST`].
    pub text: Vec<u8>,
    /// Its text was longer.
    pub long: bool,
    /// What the comments said.
    pub frame: Frame,
}

fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'_' | b'$') || b >= 0x80
}

impl<R: Read> Lexer<R> {
    pub fn new(input: R) -> Self {
        Lexer {
            input,
            buf: vec![0; CHUNK],
            at: 0,
            filled: 0,
            base: 0,
            lines: 0,
            ended: false,
            executed: 0,
            fresh_line: true,
            first_on_line: true,
            keep: true,
            text: Vec::new(),
            long: false,
            frame: Frame::default(),
        }
    }

    /// Where the next byte is.
    pub fn place(&self) -> Place {
        let seen = &self.buf[..self.at];
        let line = self.lines + newlines(seen) + 1;
        Place { line, offset: self.base + self.at as u64 }
    }

    /// Whether the last token was the first of its line.
    pub fn first_on_line(&self) -> bool {
        self.first_on_line
    }

    /// What is there of the next bytes: `n` of them, fewer only at the end. `n` is small.
    fn look(&mut self, n: usize) -> Lexed<&[u8]> {
        while self.filled - self.at < n && !self.ended {
            if self.at > 0 {
                self.base += self.at as u64;
                self.lines += newlines(&self.buf[..self.at]);
                self.buf.copy_within(self.at..self.filled, 0);
                self.filled -= self.at;
                self.at = 0;
            }
            match self.input.read(&mut self.buf[self.filled..]) {
                Ok(0) => self.ended = true,
                Ok(n) => self.filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(LexError::Io(e)),
            }
        }
        Ok(&self.buf[self.at..self.filled])
    }

    fn peek(&mut self) -> Lexed<Option<u8>> {
        if self.at < self.filled {
            return Ok(Some(self.buf[self.at]));
        }
        Ok(self.look(1)?.first().copied())
    }

    fn starts(&mut self, with: &[u8]) -> Lexed<bool> {
        Ok(self.look(with.len())?.starts_with(with))
    }

    fn push(&mut self, bytes: &[u8]) {
        push(&mut self.text, &mut self.long, self.keep, bytes);
    }

    /// Goes on to the first byte that `stop` names; answers it, or `None` at the end. With `take` the
    /// bytes before it are part of the text.
    fn run_until(&mut self, take: bool, stop: impl Fn(u8) -> bool) -> Lexed<Option<u8>> {
        loop {
            if self.look(1)?.is_empty() {
                return Ok(None);
            }
            let rest = &self.buf[self.at..self.filled];
            let found = rest.iter().position(|b| stop(*b));
            let n = found.unwrap_or(rest.len());
            if take {
                push(&mut self.text, &mut self.long, self.keep, &rest[..n]);
            }
            let byte = found.map(|n| rest[n]);
            self.at += n;
            if byte.is_some() {
                return Ok(byte);
            }
        }
    }

    /// Passes over blanks and comments.
    fn blanks(&mut self) -> Lexed<()> {
        loop {
            match self.peek()? {
                Some(b'\n') => {
                    self.fresh_line = true;
                    self.at += 1;
                }
                Some(b) if b.is_ascii_whitespace() || b == 0x0b => self.at += 1,
                // A byte order mark, which an editor put there.
                Some(0xef) if self.base + self.at as u64 == 0 && self.starts(b"\xef\xbb\xbf")? => self.at += 3,
                Some(b'#') => self.line_comment(1)?,
                Some(b'-') if matches!(self.look(3)?, [b'-', b'-'] | [b'-', b'-', 0..=b' ', ..]) => {
                    self.line_comment(2)?;
                }
                Some(b'/') if self.starts(b"/*")? => self.comment()?,
                Some(b'*') if self.executed > 0 && self.starts(b"*/")? => {
                    self.executed -= 1;
                    self.at += 2;
                }
                _ => return Ok(()),
            }
        }
    }

    fn line_comment(&mut self, signs: usize) -> Lexed<()> {
        self.at += signs;
        let mut said = Vec::new();
        loop {
            match self.peek()? {
                None | Some(b'\n') => break,
                Some(b) if said.len() < COMMENT => {
                    said.push(b);
                    self.at += 1;
                }
                Some(_) => {
                    self.run_until(false, |b| b == b'\n')?;
                }
            }
        }
        let said = said.trim_ascii();
        self.frame.header |= [&b"MariaDB dump"[..], b"MySQL dump"].iter().any(|words| said.starts_with(words));
        self.frame.completed |= said.starts_with(b"Dump completed");
        Ok(())
    }

    /// `/*`: a comment is passed over; of one that servers execute the content comes as tokens.
    fn comment(&mut self) -> Lexed<()> {
        let head = self.look(11)?;
        let signs = if head.starts_with(b"/*!") {
            3
        } else if head.starts_with(b"/*M!") {
            4
        } else {
            self.at += 2;
            return self.end_of_comment();
        };
        let digits = head[signs..].iter().take(6).take_while(|b| b.is_ascii_digit()).count();
        let version = head[signs..signs + digits].iter().fold(0, |n, b| n * 10 + u32::from(b - b'0'));
        self.at += signs + digits;
        if version >= NEVER {
            return self.end_of_comment();
        }
        self.executed += 1;
        Ok(())
    }

    fn end_of_comment(&mut self) -> Lexed<()> {
        loop {
            if self.run_until(false, |b| b == b'*')?.is_none() {
                return Err(LexError::Cut("a comment"));
            }
            self.at += 1;
            if self.peek()? == Some(b'/') {
                self.at += 1;
                return Ok(());
            }
        }
    }

    /// The next token.
    pub fn next(&mut self) -> Lexed<Token> {
        self.blanks()?;
        self.text.clear();
        self.long = false;
        let Some(byte) = self.peek()? else {
            return if self.executed > 0 { Err(LexError::Cut("a comment")) } else { Ok(Token::End) };
        };
        self.first_on_line = std::mem::take(&mut self.fresh_line);
        self.frame.completed = false;
        match byte {
            b'\'' => self.quoted(b'\'').map(|()| Token::Text),
            b'"' | b'`' => self.quoted(byte).map(|()| Token::Quoted),
            b'0'..=b'9' => self.number(),
            b'.' if matches!(self.look(2)?, [_, b'0'..=b'9', ..]) => self.number(),
            b if is_word(b) => self.word(b),
            b => {
                self.at += 1;
                Ok(Token::Sign(b))
            }
        }
    }

    fn word(&mut self, first: u8) -> Lexed<Token> {
        if let (b'x' | b'X' | b'b' | b'B' | b'n' | b'N', [_, b'\'', ..]) = (first, self.look(2)?) {
            self.at += 1;
            self.quoted(b'\'')?;
            return Ok(match first.to_ascii_lowercase() {
                b'x' => self.hex(),
                b'b' => self.bits(),
                _ => Token::Text,
            });
        }
        self.run_until(true, |b| !is_word(b))?;
        Ok(Token::Word)
    }

    fn number(&mut self) -> Lexed<Token> {
        self.run_until(true, |b| !is_word(b) && b != b'.')?;
        let prefix = self.text.get(..2).unwrap_or_default().to_ascii_lowercase();
        if matches!(&*prefix, b"0x" | b"0b") {
            self.text.drain(..2);
            return Ok(if prefix == b"0x" { self.hex() } else { self.bits() });
        }
        // 1.5e-7
        if self.text.last().is_some_and(|b| matches!(b, b'e' | b'E')) && matches!(self.peek()?, Some(b'+' | b'-')) {
            self.push(b"-");
            self.at += 1;
            self.run_until(true, |b| !b.is_ascii_digit())?;
        }
        Ok(Token::Number)
    }

    fn hex(&mut self) -> Token {
        let digit = |b: &u8| char::from(*b).to_digit(16).and_then(|d| u8::try_from(d).ok()).unwrap_or(0);
        if self.text.len() % 2 == 1 {
            self.text.insert(0, b'0');
        }
        self.text = self.text.chunks(2).map(|pair| pair.iter().fold(0, |n, b| n << 4 | digit(b))).collect();
        Token::Text
    }

    fn bits(&mut self) -> Token {
        let value = self.text.iter().fold(0u64, |n, b| n << 1 | u64::from(*b == b'1'));
        if self.keep {
            self.text = value.to_string().into_bytes();
        }
        Token::Number
    }

    /// What is between two `quote`s, which is said by two of them within. In strings a backslash
    /// gives the next byte a meaning; in names it is itself.
    fn quoted(&mut self, quote: u8) -> Lexed<()> {
        self.at += 1;
        let escapes = quote != b'`';
        loop {
            let found = match escapes {
                true => self.run_until(true, |b| b == quote || b == b'\\')?,
                false => self.run_until(true, |b| b == quote)?,
            };
            let Some(byte) = found else { return Err(LexError::Cut(if escapes { "a string" } else { "a name" })) };
            self.at += 1;
            match byte {
                b'\\' if escapes => {
                    let Some(byte) = self.peek()? else { return Err(LexError::Cut("a string")) };
                    self.at += 1;
                    let meant = match byte {
                        b'0' => 0,
                        b'b' => 8,
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        b'Z' => 0x1a,
                        other => other,
                    };
                    self.push(&[meant]);
                }
                _ => {
                    if self.peek()? != Some(quote) {
                        return Ok(());
                    }
                    self.at += 1;
                    self.push(&[quote]);
                }
            }
        }
    }

    /// The rest of the line, for what is not SQL.
    pub fn rest_of_line(&mut self) -> Lexed<()> {
        self.text.clear();
        self.long = false;
        self.run_until(true, |b| b == b'\n').map(drop)
    }
}

fn push(text: &mut Vec<u8>, long: &mut bool, keep: bool, bytes: &[u8]) {
    if !keep || bytes.is_empty() {
        return;
    }
    let room = LONGEST - text.len();
    *long |= bytes.len() > room;
    text.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

fn newlines(bytes: &[u8]) -> u64 {
    bytes.iter().map(|b| u64::from(*b == b'\n')).sum()
}
