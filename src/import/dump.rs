//! From a dump's statements to the rows of the seven tables that matter. Of each row only the
//! columns that [`rows`](super::rows) names are ever kept: whatever else a dump holds, keys and passwords
//! included, is passed over as it streams by.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;

use super::lexer::{LONGEST, LexError, Lexer, Place, Token};
use super::rows::{DISKS, KNOWN, MOST_ROWS, Tables, Value, Wanted};

/// Most columns of one table, and most databases of one dump: MariaDB's own limit, and one of ours.
const MOST_COLUMNS: usize = 4096;
const MOST_DATABASES: usize = 1000;

/// A whole dump, as far as it matters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dump {
    /// The database that was chosen; empty where the dump names none.
    pub database: String,
    /// Its rows.
    pub tables: Tables,
    /// Tables of all databases that are none of ours.
    pub tables_skipped: u64,
    /// Statements that inserted into them.
    pub inserts_skipped: u64,
}

/// What the caller says of the dump.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// It is whole, though nothing at its end says so.
    pub whole: bool,
    /// Which of its databases.
    pub database: Option<String>,
}

/// Why a dump is refused. Never says what a value was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Where.
    pub place: Option<Place>,
    /// Which table it was about.
    pub table: Option<String>,
    /// What is wrong, and what to do.
    pub words: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        if let Some(table) = &self.table {
            write!(f, "table {table}: ")?;
        }
        f.write_str(&self.words)
    }
}

type Parsed<T> = Result<T, Refused>;

/// Reads a dump to its end.
///
/// # Errors
/// It is cut, says nothing of its end, holds several databases, or something that no dump holds.
pub fn read(input: impl Read, choice: &Choice) -> Result<Dump, Refused> {
    let mut reader = Reader {
        lexer: Lexer::new(input),
        table: None,
        database: String::new(),
        columns: BTreeMap::new(),
        databases: BTreeMap::new(),
        tables_skipped: 0,
        inserts_skipped: 0,
    };
    while reader.statement()? {}
    reader.finish(choice)
}

struct Reader<R> {
    lexer: Lexer<R>,
    /// That the present statement is about.
    table: Option<String>,
    database: String,
    /// Of the known tables, by database.
    columns: BTreeMap<(String, usize), Vec<String>>,
    databases: BTreeMap<String, Tables>,
    tables_skipped: u64,
    inserts_skipped: u64,
}

impl<R: Read> Reader<R> {
    fn refused<T>(&self, words: impl Into<String>) -> Parsed<T> {
        let table = self.table.as_deref().map(shown);
        Err(Refused { place: Some(self.lexer.place()), table, words: words.into() })
    }

    /// As [`Reader::refused`], for what cannot stand here; where nothing follows, it is only half of it.
    fn unexpected<T>(&mut self, words: impl Into<String>) -> Parsed<T> {
        let refused = self.refused(words);
        match self.lexer.next() {
            Ok(Token::End) | Err(LexError::Cut(_)) => self.cut("a statement"),
            _ => refused,
        }
    }

    fn next(&mut self) -> Parsed<Token> {
        match self.lexer.next() {
            Ok(token) => Ok(token),
            Err(e) => self.lex(e),
        }
    }

    fn lex<T>(&self, error: LexError) -> Parsed<T> {
        match error {
            LexError::Cut(what) => self.cut(what),
            LexError::Io(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => self.cut("a gzip member"),
            LexError::Io(e) => self.refused(format!("it cannot be read: {e}")),
        }
    }

    fn cut<T>(&self, what: &str) -> Parsed<T> {
        self.refused(format!(
            "the dump is cut: it ends within {what}; take it again, and see that its program ended well"
        ))
    }

    /// A token within a statement.
    fn inner(&mut self) -> Parsed<Token> {
        match self.next()? {
            Token::End => self.cut("a statement"),
            token => Ok(token),
        }
    }

    fn is_word(&self, token: Token, word: &str) -> bool {
        token == Token::Word && self.lexer.text.eq_ignore_ascii_case(word.as_bytes())
    }

    /// One statement; false at the end.
    fn statement(&mut self) -> Parsed<bool> {
        self.table = None;
        self.lexer.keep = true;
        let token = self.next()?;
        let word = match token {
            Token::End => return Ok(false),
            Token::Sign(b';') => return Ok(true),
            Token::Word => String::from_utf8_lossy(&self.lexer.text).to_ascii_uppercase(),
            Token::Sign(b'(') => String::new(),
            _ => return self.unexpected("this is no SQL that a dump program writes"),
        };
        match &*word {
            "INSERT" | "REPLACE" => self.insert()?,
            "CREATE" => self.create()?,
            "USE" => self.change_database()?,
            "SET" => self.set()?,
            "DELIMITER" => self.delimited()?,
            "LOCK" | "UNLOCK" | "ALTER" | "DROP" | "START" | "BEGIN" | "COMMIT" | "ANALYZE" | "GRANT" | "FLUSH"
            | "CHANGE" | "DO" | "STOP" | "RESET" | "INSTALL" => self.rest()?,
            // What such a statement would do to the rows read so far cannot be told without a server.
            _ => return self.unexpected("a statement that no dump program writes: only a dump is read, no other SQL"),
        }
        Ok(true)
    }

    /// Passes over what is left of a statement.
    fn rest(&mut self) -> Parsed<()> {
        self.lexer.keep = false;
        while self.inner()? != Token::Sign(b';') {}
        Ok(())
    }

    fn set(&mut self) -> Parsed<()> {
        loop {
            match self.inner()? {
                Token::Sign(b';') => return Ok(()),
                Token::Text | Token::Word
                    if self.lexer.text.windows(20).any(|w| w.eq_ignore_ascii_case(b"NO_BACKSLASH_ESCAPES")) =>
                {
                    return self.refused("it was made with NO_BACKSLASH_ESCAPES, which is not read: dump without it");
                }
                _ => {}
            }
        }
    }

    fn change_database(&mut self) -> Parsed<()> {
        self.database = self.name()?;
        if self.databases.len() >= MOST_DATABASES {
            return self.refused("it holds too many databases: dump the one that is meant");
        }
        self.rest()
    }

    /// Triggers and routines: bodies with semicolons, up to the line that sets the delimiter back.
    fn delimited(&mut self) -> Parsed<()> {
        loop {
            if let Err(e) = self.lexer.rest_of_line() {
                return self.lex(e);
            }
            if self.lexer.text.trim_ascii() == b";" {
                return Ok(());
            }
            loop {
                self.lexer.keep = true;
                let token = self.inner()?;
                if self.is_word(token, "DELIMITER") && self.lexer.first_on_line() {
                    break;
                }
            }
        }
    }

    /// A name, in any of the ways it may be written.
    fn name(&mut self) -> Parsed<String> {
        match self.inner()? {
            Token::Word | Token::Quoted if !self.lexer.long => {
                Ok(String::from_utf8_lossy(&self.lexer.text).into_owned())
            }
            _ => self.unexpected("a name was expected here"),
        }
    }

    /// A table's name, which may be behind its database's, and the token after it.
    fn table_name(&mut self, mut first: String) -> Parsed<(String, String, Token)> {
        let mut database = self.database.clone();
        let mut token = self.inner()?;
        if token == Token::Sign(b'.') {
            database = std::mem::replace(&mut first, self.name()?);
            token = self.inner()?;
        }
        self.table = Some(first.clone());
        Ok((database, first, token))
    }

    fn tables(&mut self, database: &str, table: usize) -> &mut Tables {
        let tables = self.databases.entry(database.to_owned()).or_default();
        tables.present.insert(KNOWN[table].name);
        tables
    }

    fn create(&mut self) -> Parsed<()> {
        let mut word = self.inner()?;
        if self.is_word(word, "TEMPORARY") {
            word = self.inner()?;
        }
        if !self.is_word(word, "TABLE") {
            // A statement of one word has its end behind it already.
            return if word == Token::Sign(b';') { Ok(()) } else { self.rest() };
        }
        let mut name = self.name()?;
        if name.eq_ignore_ascii_case("IF") {
            for word in ["NOT", "EXISTS"] {
                let token = self.inner()?;
                if !self.is_word(token, word) {
                    return self.unexpected("IF NOT EXISTS was expected here");
                }
            }
            name = self.name()?;
        }
        let (database, name, token) = self.table_name(name)?;
        let Some(table) = KNOWN.iter().position(|k| k.name == name) else {
            self.tables_skipped += 1;
            return if token == Token::Sign(b';') { Ok(()) } else { self.rest() };
        };
        if token != Token::Sign(b'(') {
            return self.unexpected("its columns were expected here");
        }
        let columns = self.definitions()?;
        self.rest()?;
        let before = columns.iter().any(|c| c == "cloudstack_volume_uuid");
        if self.columns.insert((database.clone(), table), columns).is_some() {
            return self.refused("it is created twice: this is more than one dump; import them one by one");
        }
        self.tables(&database, table).before |= table == DISKS && before;
        Ok(())
    }

    /// The names of the columns between the brackets of a CREATE TABLE.
    fn definitions(&mut self) -> Parsed<Vec<String>> {
        const NO_COLUMN: [&str; 10] =
            ["PRIMARY", "UNIQUE", "KEY", "INDEX", "CONSTRAINT", "FULLTEXT", "SPATIAL", "FOREIGN", "CHECK", "PERIOD"];
        let mut columns = Vec::new();
        loop {
            self.lexer.keep = true;
            let token = self.inner()?;
            let name = String::from_utf8_lossy(&self.lexer.text).to_ascii_lowercase();
            match token {
                Token::Quoted => columns.push(name),
                Token::Word if !NO_COLUMN.iter().any(|word| word.eq_ignore_ascii_case(&name)) => columns.push(name),
                Token::Word => {}
                _ => return self.unexpected("a column was expected here"),
            }
            if columns.len() > MOST_COLUMNS {
                return self.unexpected("it has more columns than a table can have");
            }
            self.lexer.keep = false;
            let mut depth = 0u32;
            loop {
                match self.inner()? {
                    Token::Sign(b'(') => depth += 1,
                    Token::Sign(b')') if depth == 0 => return Ok(columns),
                    Token::Sign(b')') => depth -= 1,
                    Token::Sign(b',') if depth == 0 => break,
                    Token::Sign(b';') => return self.unexpected("its definition ends too early"),
                    _ => {}
                }
            }
        }
    }

    fn insert(&mut self) -> Parsed<()> {
        let mut token = self.inner()?;
        while ["INTO", "IGNORE", "DELAYED", "LOW_PRIORITY"].iter().any(|word| self.is_word(token, word)) {
            token = self.inner()?;
        }
        let first = match token {
            Token::Word | Token::Quoted if !self.lexer.long => String::from_utf8_lossy(&self.lexer.text).into_owned(),
            _ => return self.unexpected("a table was expected here"),
        };
        let (database, name, mut token) = self.table_name(first)?;
        let Some(table) = KNOWN.iter().position(|k| k.name == name) else {
            self.inserts_skipped += 1;
            return if token == Token::Sign(b';') { Ok(()) } else { self.rest() };
        };
        let names = if token == Token::Sign(b'(') {
            let names = self.column_list()?;
            token = self.inner()?;
            names
        } else {
            match self.columns.get(&(database.clone(), table)) {
                Some(columns) => columns.clone(),
                None => {
                    return self.unexpected(
                        "the dump does not say which columns it has: make it with the CREATE TABLE statements, or with \
                         --complete-insert",
                    );
                }
            }
        };
        if !self.is_word(token, "VALUES") && !self.is_word(token, "VALUE") {
            return self.unexpected("VALUES was expected here: only what a dump program writes is read");
        }
        let wanted = Wanted::of(table, names);
        self.tables(&database, table).before |= wanted.is_before(table);
        loop {
            if self.inner()? != Token::Sign(b'(') {
                return self.unexpected("a row was expected here");
            }
            let row = self.row(table, &wanted)?;
            if !self.tables(&database, table).take(table, row) {
                return self.refused(format!("it has more than {MOST_ROWS} rows to read, which no installation had"));
            }
            match self.inner()? {
                Token::Sign(b',') => {}
                Token::Sign(b';') => return Ok(()),
                _ => return self.unexpected("another row or the end of the statement was expected here"),
            }
        }
    }

    fn column_list(&mut self) -> Parsed<Vec<String>> {
        let mut names = Vec::new();
        loop {
            names.push(self.name()?.to_ascii_lowercase());
            if names.len() > MOST_COLUMNS {
                return self.unexpected("it has more columns than a table can have");
            }
            match self.inner()? {
                Token::Sign(b',') => {}
                Token::Sign(b')') => return Ok(names),
                _ => return self.unexpected("another column was expected here"),
            }
        }
    }

    fn row(&mut self, table: usize, wanted: &Wanted) -> Parsed<Vec<Value>> {
        let mut row = vec![None; KNOWN[table].columns.len()];
        for (n, slot) in wanted.slots.iter().enumerate() {
            let (value, after) = match slot {
                None => (None, self.pass_value()?),
                Some(_) => self.value(&wanted.names[n])?,
            };
            if let (Some(slot), Some(value)) = (slot, value) {
                row[*slot] = Some(value);
            }
            let last = n + 1 == wanted.slots.len();
            if after != Token::Sign(if last { b')' } else { b',' }) {
                let words = format!("a row has not the {} values that its columns want", wanted.slots.len());
                return self.unexpected(words);
            }
        }
        Ok(row)
    }

    /// Passes over a value that is not kept, however long; answers the token after it.
    fn pass_value(&mut self) -> Parsed<Token> {
        self.lexer.keep = false;
        let mut depth = 0u32;
        loop {
            let token = self.inner()?;
            match token {
                Token::Sign(b'(') => depth += 1,
                Token::Sign(b')' | b',') if depth == 0 => {
                    self.lexer.keep = true;
                    return Ok(token);
                }
                Token::Sign(b')') => depth -= 1,
                Token::Sign(b';') => return self.unexpected("a row ends within a value"),
                _ => {}
            }
        }
    }

    /// A value that is kept, and the token after it.
    fn value(&mut self, column: &str) -> Parsed<(Value, Token)> {
        self.lexer.keep = true;
        let mut token = self.inner()?;
        // `_binary 'x'`, `_utf8mb4'x'`
        if token == Token::Word && self.lexer.text.first() == Some(&b'_') {
            token = self.inner()?;
            if token != Token::Text {
                return self.unexpected(format!("column {}: a text was expected here", shown(column)));
            }
        }
        let mut sign = "";
        if matches!(token, Token::Sign(b'-' | b'+')) {
            sign = if token == Token::Sign(b'-') { "-" } else { "" };
            token = self.inner()?;
            if token != Token::Number {
                return self.unexpected(format!("column {}: a number was expected here", shown(column)));
            }
        }
        if self.lexer.long {
            let words = format!("column {}: a value of more than {LONGEST} bytes, which it never had", shown(column));
            return self.unexpected(words);
        }
        let value = match token {
            Token::Text | Token::Number | Token::Quoted => {
                Some(format!("{sign}{}", String::from_utf8_lossy(&self.lexer.text)))
            }
            Token::Word if self.lexer.text.eq_ignore_ascii_case(b"NULL") => None,
            _ => return self.unexpected(format!("column {}: no value that a dump program writes", shown(column))),
        };
        Ok((value, self.inner()?))
    }

    fn finish(mut self, choice: &Choice) -> Parsed<Dump> {
        let frame = self.lexer.frame;
        if !frame.completed && frame.header {
            return self.refused(
                "the dump is cut: its last line is not \"-- Dump completed\"; take it again, and see that its program \
                 ended well",
            );
        }
        if !frame.completed && !choice.whole {
            return self.refused(
                "it has no comments (--skip-comments, --compact), so nothing says whether this is its end: take it with \
                 them, or give --whole if you know that it is whole",
            );
        }
        let nowhere = |words: String| Err(Refused { place: None, table: None, words });
        let found = || {
            let names = self.databases.keys().map(|name| match name.as_str() {
                "" => "one without a name".to_owned(),
                name => shown(name),
            });
            names.collect::<Vec<_>>().join(", ")
        };
        let database = match (&choice.database, self.databases.len()) {
            (_, 0) => {
                let names: Vec<_> = KNOWN.iter().map(|k| k.name).collect();
                return nowhere(format!(
                    "it is no dump of the old database: none of its tables is there ({})",
                    names.join(", ")
                ));
            }
            (Some(name), _) if self.databases.contains_key(name) => name.clone(),
            (Some(name), _) => {
                return nowhere(format!(
                    "it holds no database {} with the tables of the old one, but {}",
                    shown(name),
                    found()
                ));
            }
            (None, 1) => self.databases.keys().next().cloned().unwrap_or_default(),
            (None, _) => {
                return nowhere(format!(
                    "it holds several databases with such tables ({}): name one with --database",
                    found()
                ));
            }
        };
        Ok(Dump {
            tables: self.databases.remove(&database).unwrap_or_default(),
            database,
            tables_skipped: self.tables_skipped,
            inserts_skipped: self.inserts_skipped,
        })
    }
}

/// A text of the dump as it may be shown: one line, of bounded length.
pub(super) fn shown(text: &str) -> String {
    const MOST: usize = 200;
    let mut shown: String = text.chars().take(MOST).flat_map(char::escape_debug).collect();
    if text.chars().nth(MOST).is_some() {
        shown.push('…');
    }
    shown
}
