-- The whole schema as it stands, for reading: `make schema` joins it out of the migrations, a test compares what the two make.
-- A function that was replaced stands where it first stood, as it was last written.

set check_function_bodies = off; -- it may name what comes after it


-- ============================================================================
-- accounts
-- ============================================================================

-- Accounts: the gateway's state, users, keys, plans and limits. Money is bigint nano-US-dollars (*_nanos); 1 credit = 1 US dollar.
-- Every table: row level security on, no policy, nothing for public, anon and authenticated; the service role works through grants.

create schema if not exists extensions;

create table public.gateway_state (
    singleton boolean primary key default true check (singleton),
    mode text not null default 'sandbox' check (mode in ('sandbox', 'live')),
    mode_since timestamptz not null default now(),
    -- No record that expires before this moment is still pending: the sweep starts here.
    swept_until timestamptz not null default '-infinity'
);
comment on table public.gateway_state is 'One row: what this database remembers about itself.';
insert into public.gateway_state default values;
alter table public.gateway_state enable row level security;
revoke all on public.gateway_state from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.gateway_state to service_role;

create table public.users (
    id bigint generated always as identity primary key,
    username varchar(64) not null,
    email varchar(254) not null,
    auth_method text not null default 'email',
    role text not null default 'user',
    credits_nanos bigint not null default 0,
    held_nanos bigint not null default 0,
    is_funded boolean not null default false,
    is_active boolean not null default true,
    subscription_status text not null default 'trial',
    trial_expires_at timestamptz,
    preferences jsonb not null default '{}',
    settings jsonb not null default '{}',
    registration_date timestamptz not null default now(),
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    deleted_at timestamptz,
    constraint users_never_overdrawn check (0 <= held_nanos and held_nanos <= credits_nanos)
) with (fillfactor = 50);
-- One function, because PostgreSQL reads the text of a table's checks anew for every statement, and users are updated twice a request.
create function public.is_sound_user(u public.users) returns boolean language plpgsql immutable as $$
begin
    return u.username <> '' and length(u.email) >= 3
        and u.auth_method in ('email', 'wallet', 'google', 'github')
        and u.role in ('user', 'admin')
        and u.subscription_status in ('trial', 'active', 'expired', 'cancelled')
        and jsonb_typeof(u.preferences) = 'object' and jsonb_typeof(u.settings) = 'object';
end $$;
revoke all on function public.is_sound_user(public.users) from public, anon, authenticated;
grant execute on function public.is_sound_user(public.users) to service_role;
alter table public.users add constraint users_sound check (public.is_sound_user(users));
comment on column public.users.is_funded is
    'True once an admin granted or the user bought credits: pay-as-you-go instead of the free plan''s limits.';
comment on constraint users_never_overdrawn on public.users is
    'Promise 1: credits never fall below what is held, and what is held never below zero.';
create unique index users_email_key on public.users (lower(email));
comment on index public.users_email_key is 'One account per address, whatever its case.';
create unique index users_username_key on public.users (lower(username));
alter table public.users enable row level security;
revoke all on public.users from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.users to service_role;
revoke all on sequence public.users_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.users_id_seq to service_role;

create table public.api_keys_new (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    key_name text not null check (length(key_name) between 1 and 100),
    key_prefix text not null check (length(key_prefix) between 1 and 16),
    last4 text not null check (length(last4) = 4),
    key_hash text not null check (key_hash ~ '^[0-9a-f]{64}$'),
    hash_secret_id text not null,
    encrypted_key text,
    environment_tag text not null default 'live'
        check (environment_tag in ('live', 'test', 'staging', 'development')),
    scope_permissions jsonb not null default '{"read": ["*"], "write": ["*"]}'
        check (jsonb_typeof(scope_permissions) = 'object'),
    ip_allowlist cidr[] not null default '{}',
    domain_referrers text[] not null default '{}',
    allowed_models text[],
    expiration_date timestamptz,
    max_requests bigint check (max_requests > 0),
    budget_nanos bigint check (budget_nanos >= 0),
    budget_window text check (budget_window in ('day', 'week', 'month', 'lifetime')),
    is_primary boolean not null default false,
    is_active boolean not null default true,
    previous_key_hash text check (previous_key_hash ~ '^[0-9a-f]{64}$'),
    previous_hash_secret_id text,
    previous_valid_until timestamptz,
    revoked_at timestamptz,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    constraint api_keys_new_budget_has_window check ((budget_nanos is null) = (budget_window is null))
) with (fillfactor = 80);
comment on table public.api_keys_new is 'The keys. Only an HMAC is stored; requests_used and last_used_at live in rate_limit_usage.';
create unique index api_keys_new_hash_key on public.api_keys_new (key_hash);
create unique index api_keys_new_previous_hash_key on public.api_keys_new (previous_key_hash) where previous_key_hash is not null;
create unique index api_keys_new_name_key on public.api_keys_new (user_id, key_name) where revoked_at is null;
comment on index public.api_keys_new_name_key is 'A name is unique among a user''s keys that are not revoked.';
create unique index api_keys_new_primary_key on public.api_keys_new (user_id) where is_primary and revoked_at is null;
create index api_keys_new_user_idx on public.api_keys_new (user_id);
create index api_keys_new_prefix_idx on public.api_keys_new (last4);
alter table public.api_keys_new enable row level security;
revoke all on public.api_keys_new from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.api_keys_new to service_role;
revoke all on sequence public.api_keys_new_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.api_keys_new_id_seq to service_role;

create table public.api_keys (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    key_sha256 text not null unique check (key_sha256 ~ '^[0-9a-f]{64}$'),
    key_name text not null check (length(key_name) between 1 and 100),
    key_prefix text not null check (length(key_prefix) between 1 and 16),
    last4 text not null check (length(last4) = 4),
    environment_tag text not null default 'live'
        check (environment_tag in ('live', 'test', 'staging', 'development')),
    scope_permissions jsonb not null default '{"read": ["*"], "write": ["*"]}'
        check (jsonb_typeof(scope_permissions) = 'object'),
    expiration_date timestamptz,
    max_requests bigint check (max_requests > 0),
    is_active boolean not null default true,
    moved_to bigint references public.api_keys_new (id),
    created_at timestamptz not null default now()
);
comment on table public.api_keys is 'Keys of older formats, brought in by import, known by their SHA-256 until they are moved to api_keys_new on first use.';
create index api_keys_user_idx on public.api_keys (user_id);
alter table public.api_keys enable row level security;
revoke all on public.api_keys from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.api_keys to service_role;
revoke all on sequence public.api_keys_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.api_keys_id_seq to service_role;

create table public.plans (
    id bigint generated always as identity primary key,
    slug text not null unique check (slug ~ '^[a-z0-9][a-z0-9-]{0,62}$'),
    name text not null check (length(name) between 1 and 100),
    description text not null default '',
    price_per_month_nanos bigint not null default 0 check (price_per_month_nanos >= 0),
    daily_request_limit bigint check (daily_request_limit >= 0),
    monthly_request_limit bigint check (monthly_request_limit >= 0),
    daily_token_limit bigint check (daily_token_limit >= 0),
    monthly_token_limit bigint check (monthly_token_limit >= 0),
    concurrency integer check (concurrency >= 0),
    features text[] not null default '{}',
    allowed_models text[],
    environment_factors jsonb not null default '{"staging": 1, "development": 1}'
        check (jsonb_typeof(environment_factors) = 'object'),
    is_active boolean not null default true,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
comment on table public.plans is 'What a subscription allows; null is unlimited, zero refuses all. "free" and "pay-as-you-go" apply without a subscription.';
insert into public.plans (slug, name, description, daily_request_limit, monthly_request_limit, daily_token_limit, monthly_token_limit)
values ('free', 'Free', 'What an account without a plan and without bought or granted credits may use.', 100, 1000, 10000, 100000),
       ('pay-as-you-go', 'Pay as you go', 'Prepaid credits without a plan: rate limits only.', null, null, null, null);
alter table public.plans enable row level security;
revoke all on public.plans from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.plans to service_role;
revoke all on sequence public.plans_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.plans_id_seq to service_role;

create table public.user_plans (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    plan_id bigint not null references public.plans (id),
    start_date timestamptz not null,
    end_date timestamptz not null,
    is_active boolean not null default true,
    created_at timestamptz not null default now(),
    constraint user_plans_in_order check (start_date < end_date)
);
create unique index user_plans_one_active on public.user_plans (user_id) where is_active;
comment on index public.user_plans_one_active is 'A user has one plan at a time; the others are history.';
create index user_plans_plan_idx on public.user_plans (plan_id);
create index user_plans_user_idx on public.user_plans (user_id);
alter table public.user_plans enable row level security;
revoke all on public.user_plans from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.user_plans to service_role;
revoke all on sequence public.user_plans_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.user_plans_id_seq to service_role;

create table public.rate_limit_configs (
    subject text not null check (subject in ('default', 'user', 'key')),
    subject_id bigint not null,
    requests_per_minute bigint check (requests_per_minute >= 0),
    requests_per_hour bigint check (requests_per_hour >= 0),
    requests_per_day bigint check (requests_per_day >= 0),
    tokens_per_minute bigint check (tokens_per_minute >= 0),
    tokens_per_hour bigint check (tokens_per_hour >= 0),
    tokens_per_day bigint check (tokens_per_day >= 0),
    concurrency integer check (concurrency >= 0),
    burst bigint check (burst >= 0),
    updated_at timestamptz not null default now(),
    primary key (subject, subject_id)
);
comment on table public.rate_limit_configs is
    'Limits of a user or a key; null is unlimited, zero refuses all. A user without a row has the default''s; a key without one has only its user''s.';
insert into public.rate_limit_configs (subject, subject_id, requests_per_minute, requests_per_hour, requests_per_day,
                                       tokens_per_minute, tokens_per_hour, tokens_per_day)
values ('default', 0, 60, 1000, 10000, 10000, 100000, 1000000);
alter table public.rate_limit_configs enable row level security;
revoke all on public.rate_limit_configs from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.rate_limit_configs to service_role;


-- ============================================================================
-- ledger
-- ============================================================================

-- The books: usage records (the journal), credit transactions and the audit log. What was written stays written.

create table public.usage_records (
    request_id uuid primary key,
    client_request_id varchar(256),
    user_id bigint not null references public.users (id),
    key_id bigint not null references public.api_keys_new (id),
    mode text not null,
    environment text not null,
    endpoint text not null,
    model text not null,
    model_used text,
    provider text,
    prompt_estimate bigint not null default 0,
    output_granted bigint not null default 0,
    prompt_tokens bigint,
    completion_tokens bigint,
    cached_tokens bigint,
    reasoning_tokens bigint,
    hold_nanos bigint not null,
    upstream_cost_nanos bigint,
    cost_nanos bigint not null default 0,
    overrun_nanos bigint not null default 0,
    markup numeric not null,
    status text not null default 'pending',
    settlement_source text,
    finish_reason text,
    error_code text,
    streamed boolean not null default false,
    latency_ms bigint,
    time_to_first_token_ms bigint,
    generation_id varchar(256),
    created_at timestamptz not null,
    expires_at timestamptz not null,
    settled_at timestamptz
) with (fillfactor = 40);

-- What holds of every record. One function, because PostgreSQL reads the text of a table's checks anew for every statement: as a dozen
-- checks these rules took a quarter of the time of admission and settlement.
create function public.is_sound_record(r public.usage_records) returns boolean language plpgsql immutable as $$
begin
    return least(r.prompt_estimate, r.output_granted, r.hold_nanos, r.upstream_cost_nanos, r.cost_nanos, r.overrun_nanos) >= 0
        and r.markup > 0
        and r.mode in ('sandbox', 'live')
        and r.environment in ('live', 'test', 'staging', 'development')
        and case r.status
            when 'pending' then r.settled_at is null and r.settlement_source is null and r.cost_nanos = 0
            else r.status in ('completed', 'failed', 'cancelled', 'expired') and r.settled_at is not null
                 and coalesce(r.settlement_source in ('usage', 'generation', 'none'), false)
        end;
end $$;
revoke all on function public.is_sound_record(public.usage_records) from public, anon, authenticated;
grant execute on function public.is_sound_record(public.usage_records) to service_role;
alter table public.usage_records add constraint usage_records_sound check (public.is_sound_record(usage_records));
comment on constraint usage_records_sound on public.usage_records is
    'No negative amount; pending without an end and a cost, settled with both.';
comment on table public.usage_records is
    'One row per admitted request: pending with its hold, then finished by settlement. No index may mention what settlement changes, '
    'or updates stop being heap-only; a settled row is longer, and 40 leaves room for a page whose rows are settled in one transaction.';
create index usage_records_user_idx on public.usage_records (user_id, created_at desc);
create index usage_records_key_idx on public.usage_records (key_id, created_at);
create index usage_records_expiry_idx on public.usage_records using brin (expires_at) with (pages_per_range = 16);
comment on index public.usage_records_expiry_idx is 'The sweep''s way to expired holds; records arrive in this order.';
alter table public.usage_records enable row level security;
revoke all on public.usage_records from public, anon, authenticated, service_role;
grant select, insert, update on public.usage_records to service_role;

create table public.credit_transactions (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    kind text not null check (kind in ('grant', 'purchase', 'refund', 'adjustment', 'expiry')),
    amount_nanos bigint not null check (amount_nanos <> 0),
    balance_after_nanos bigint not null check (balance_after_nanos >= 0),
    payment_method text check (payment_method in ('mastercard', 'paca_token')),
    request_id uuid references public.usage_records (request_id),
    idempotency_key text check (length(idempotency_key) between 1 and 255),
    actor text not null,
    reason text not null default '' check (length(reason) <= 500),
    created_at timestamptz not null default clock_timestamp(),
    constraint credit_transactions_sign check (
        case kind when 'grant' then amount_nanos > 0 when 'purchase' then amount_nanos > 0 when 'refund' then amount_nanos > 0
                  when 'expiry' then amount_nanos < 0 else true end
    ),
    constraint credit_transactions_refund_names_request check ((kind = 'refund') = (request_id is not null))
);
comment on table public.credit_transactions is 'Every change of credits that is not the charge of a request.';
create unique index credit_transactions_idempotency_key on public.credit_transactions (idempotency_key);
comment on index public.credit_transactions_idempotency_key is 'The same order twice is one transaction.';
create index credit_transactions_user_idx on public.credit_transactions (user_id, id desc);
create index credit_transactions_request_idx on public.credit_transactions (request_id) where request_id is not null;
alter table public.credit_transactions enable row level security;
revoke all on public.credit_transactions from public, anon, authenticated, service_role;
grant select, insert on public.credit_transactions to service_role;
revoke all on sequence public.credit_transactions_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.credit_transactions_id_seq to service_role;

create table public.audit_logs (
    id bigint generated always as identity primary key,
    actor text not null,
    action text not null,
    target text,
    user_id bigint references public.users (id),
    key_id bigint references public.api_keys_new (id),
    ip inet,
    user_agent text check (length(user_agent) <= 512),
    request_id uuid,
    details jsonb not null default '{}' check (jsonb_typeof(details) = 'object'),
    -- Set for refusals only: the same refusal of the same subject within a minute is one row with a count.
    refusal_minute timestamptz,
    occurrences bigint not null default 1 check (occurrences > 0),
    created_at timestamptz not null default clock_timestamp()
);
create unique index audit_logs_refusal_key on public.audit_logs (actor, action, refusal_minute) where refusal_minute is not null;
create index audit_logs_user_idx on public.audit_logs (user_id, id desc);
create index audit_logs_key_idx on public.audit_logs (key_id, id desc);
alter table public.audit_logs enable row level security;
revoke all on public.audit_logs from public, anon, authenticated, service_role;
grant select, insert, update on public.audit_logs to service_role;
revoke all on sequence public.audit_logs_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.audit_logs_id_seq to service_role;

create function public.refuse_change() returns trigger language plpgsql set search_path = '' as $$
begin
    raise exception '% is append-only: % is refused', tg_table_name, lower(tg_op) using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_change() from public, anon, authenticated;
grant execute on function public.refuse_change() to service_role;

create trigger credit_transactions_append_only before update or delete on public.credit_transactions
    for each row execute function public.refuse_change();
create trigger credit_transactions_no_truncate before truncate on public.credit_transactions
    for each statement execute function public.refuse_change();
create trigger usage_records_never_deleted before delete on public.usage_records
    for each row execute function public.refuse_change();
create trigger usage_records_no_truncate before truncate on public.usage_records
    for each statement execute function public.refuse_change();
create trigger audit_logs_never_deleted before delete on public.audit_logs
    for each row execute function public.refuse_change();
create trigger audit_logs_no_truncate before truncate on public.audit_logs
    for each statement execute function public.refuse_change();

-- A settled record is frozen; only one that was settled without knowing the cost may be amended, once, by what the upstream says.
create function public.refuse_thaw() returns trigger language plpgsql set search_path = '' as $$
begin
    if old.settlement_source = 'none' and new.settlement_source in ('usage', 'generation')
       and (new.request_id, new.user_id, new.key_id, new.hold_nanos, new.markup, new.created_at)
           is not distinct from (old.request_id, old.user_id, old.key_id, old.hold_nanos, old.markup, old.created_at) then
        return new;
    end if;
    raise exception 'usage record % is settled and frozen', old.request_id using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_thaw() from public, anon, authenticated;
grant execute on function public.refuse_thaw() to service_role;
create trigger usage_records_frozen before update on public.usage_records
    for each row when (old.status <> 'pending') execute function public.refuse_thaw();

create function public.refuse_identity_change() returns trigger language plpgsql set search_path = '' as $$
begin
    raise exception 'usage record %: who, when and how much was held never changes', old.request_id using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_identity_change() from public, anon, authenticated;
grant execute on function public.refuse_identity_change() to service_role;
create trigger usage_records_identity before update of request_id, user_id, key_id, mode, environment, hold_nanos, markup, created_at
    on public.usage_records for each row execute function public.refuse_identity_change();

-- Of an audit row only the count of a repeated refusal may grow.
create function public.refuse_audit_change() returns trigger language plpgsql set search_path = '' as $$
begin
    if old.refusal_minute is not null and new.occurrences > old.occurrences
       and to_jsonb(new) - 'occurrences' = to_jsonb(old) - 'occurrences' then
        return new;
    end if;
    raise exception 'audit_logs is append-only: update is refused' using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_audit_change() from public, anon, authenticated;
grant execute on function public.refuse_audit_change() to service_role;
create trigger audit_logs_append_only before update on public.audit_logs
    for each row execute function public.refuse_audit_change();


-- ============================================================================
-- limits
-- ============================================================================

-- Limits: counters in rings of buckets, one row per subject, and the arithmetic on them.
--
-- A ring of n buckets is a bigint[]: [1..n] requests, [n+1..2n] tokens, [2n+1] all requests, [2n+2] all tokens, [2n+3] the number of the
-- newest bucket (unix time / bucket width). The n buckets are those that touch the last window, so their sum never misses anything
-- that happened within it: no interval of the window's length ever exceeds the limit, and a place frees at most a bucket late.

create function public.empty_ring(p_size int) returns bigint[] language sql immutable set search_path = '' as $$
    select array_fill(0::bigint, array[2 * p_size + 3])
$$;
revoke all on function public.empty_ring(int) from public, anon, authenticated;
grant execute on function public.empty_ring(int) to service_role;

create table public.rate_limit_usage (
    subject text not null,
    subject_id bigint not null,
    -- Null for a key without limits of its own: there is nothing to count for.
    burst_ring bigint[] default public.empty_ring(11),
    minute_ring bigint[] default public.empty_ring(7),
    hour_ring bigint[] default public.empty_ring(13),
    day_ring bigint[] default public.empty_ring(25),
    plan_day date not null default '-infinity',
    plan_day_requests bigint not null default 0,
    plan_day_tokens bigint not null default 0,
    plan_month date not null default '-infinity',
    plan_month_requests bigint not null default 0,
    plan_month_tokens bigint not null default 0,
    slots bigint not null default 0,
    test_slots bigint not null default 0,
    budget_since timestamptz not null default '-infinity',
    budget_spent_nanos bigint not null default 0,
    budget_held_nanos bigint not null default 0,
    requests_used bigint not null default 0,
    last_used_at timestamptz,
    -- Nothing of this subject that is older was still pending: where a recount has to start.
    pending_since timestamptz not null default '-infinity',
    recounted_at timestamptz not null default '-infinity',
    primary key (subject, subject_id),
    -- One short expression: PostgreSQL reads a table's checks anew for every statement.
    constraint rate_limit_usage_never_negative check (
        least(slots, test_slots, budget_spent_nanos, budget_held_nanos, plan_day_tokens, plan_month_tokens) >= 0
    )
) with (fillfactor = 50);
comment on table public.rate_limit_usage is 'The counters of a key, a user or a network address. No row is shared between users.';
alter table public.rate_limit_usage enable row level security;
revoke all on public.rate_limit_usage from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.rate_limit_usage to service_role;

create function public.advance_ring(p_ring bigint[], p_size int, p_now bigint) returns bigint[]
language plpgsql immutable as $$
declare
    v_ring bigint[] := p_ring;
    v_newest bigint := p_ring[2 * p_size + 3];
    v_bucket bigint := v_newest;
    v_slot int;
begin
    if p_ring is null or v_newest >= p_now then
        return v_ring;
    end if;
    if p_now - v_newest >= p_size then
        v_ring := array_fill(0::bigint, array[2 * p_size + 3]);
    else
        while v_bucket < p_now loop -- a for loop counts in integers, which these numbers exceed
            v_bucket := v_bucket + 1;
            v_slot := v_bucket % p_size + 1;
            v_ring[2 * p_size + 1] := v_ring[2 * p_size + 1] - v_ring[v_slot];
            v_ring[2 * p_size + 2] := v_ring[2 * p_size + 2] - v_ring[p_size + v_slot];
            v_ring[v_slot] := 0;
            v_ring[p_size + v_slot] := 0;
        end loop;
    end if;
    v_ring[2 * p_size + 3] := p_now;
    return v_ring;
end $$;
comment on function public.advance_ring is 'The ring with p_now as its newest bucket; a clock that went backwards leaves it as it is.';
revoke all on function public.advance_ring(bigint[], int, bigint) from public, anon, authenticated;
grant execute on function public.advance_ring(bigint[], int, bigint) to service_role;

create function public.count_in_ring(p_ring bigint[], p_size int, p_bucket bigint, p_requests bigint, p_tokens bigint) returns bigint[]
language plpgsql immutable as $$
declare
    v_ring bigint[] := p_ring;
    v_newest bigint := p_ring[2 * p_size + 3];
    v_slot int := least(p_bucket, v_newest) % p_size + 1;
begin
    if p_ring is null or p_bucket <= v_newest - p_size then
        return v_ring;
    end if;
    v_ring[v_slot] := v_ring[v_slot] + p_requests;
    v_ring[p_size + v_slot] := v_ring[p_size + v_slot] + p_tokens;
    v_ring[2 * p_size + 1] := v_ring[2 * p_size + 1] + p_requests;
    v_ring[2 * p_size + 2] := v_ring[2 * p_size + 2] + p_tokens;
    return v_ring;
end $$;
comment on function public.count_in_ring is
    'Counts in one bucket of an advanced ring, null for the newest; a bucket that has left the ring counts no more.';
revoke all on function public.count_in_ring(bigint[], int, bigint, bigint, bigint) from public, anon, authenticated;
grant execute on function public.count_in_ring(bigint[], int, bigint, bigint, bigint) to service_role;

create function public.ring_frees_at(p_ring bigint[], p_size int, p_width_ms bigint, p_offset int, p_excess bigint) returns bigint
language plpgsql immutable as $$
declare
    v_newest bigint := p_ring[2 * p_size + 3];
    v_bucket bigint := v_newest - p_size;
    v_freed bigint := 0;
begin
    while v_bucket < v_newest loop
        v_bucket := v_bucket + 1;
        v_freed := v_freed + p_ring[p_offset + v_bucket % p_size + 1];
        if v_freed >= p_excess then
            return (v_bucket + p_size) * p_width_ms;
        end if;
    end loop;
    return (v_newest + p_size) * p_width_ms;
end $$;
comment on function public.ring_frees_at is
    'When (unix ms) at least p_excess of what was counted will have left the ring; p_offset 0 looks at requests, p_size at tokens.';
revoke all on function public.ring_frees_at(bigint[], int, bigint, int, bigint) from public, anon, authenticated;
grant execute on function public.ring_frees_at(bigint[], int, bigint, int, bigint) to service_role;

-- What the limits say so far: the longest refusal (window is null while there is none), and the tightest limits for the headers.
create type public.limit_state as (
    refused_window text,
    refused_unit text,
    refused_limit bigint,
    frees_at_ms bigint,
    never boolean,
    request_limit bigint,
    request_left bigint,
    request_reset_ms bigint,
    token_limit bigint,
    token_left bigint,
    token_reset_ms bigint
);
revoke all on type public.limit_state from public, anon, authenticated;
grant usage on type public.limit_state to service_role;

-- Of several refusals the one that lasts longest is told: after its Retry-After none of them stands in the way.
create function public.refuse_until(
    p_state public.limit_state, p_window text, p_unit text, p_limit bigint, p_never boolean, p_frees_at_ms bigint
) returns public.limit_state language plpgsql immutable as $$
declare
    v_state public.limit_state := p_state;
begin
    if v_state.refused_window is null or (p_never, p_frees_at_ms) > (v_state.never, v_state.frees_at_ms) then
        v_state.refused_window := p_window;
        v_state.refused_unit := p_unit;
        v_state.refused_limit := p_limit;
        v_state.never := p_never;
        v_state.frees_at_ms := p_frees_at_ms;
    end if;
    return v_state;
end $$;
revoke all on function public.refuse_until(public.limit_state, text, text, bigint, boolean, bigint) from public, anon, authenticated;
grant execute on function public.refuse_until(public.limit_state, text, text, bigint, boolean, bigint) to service_role;

create function public.check_window(
    p_state public.limit_state, p_window text, p_ring bigint[], p_size int, p_width_ms bigint,
    p_requests bigint, p_tokens bigint, p_need bigint
) returns public.limit_state language plpgsql immutable as $$
declare
    v_state public.limit_state := p_state;
    v_requests bigint := p_ring[2 * p_size + 1];
    v_tokens bigint := p_ring[2 * p_size + 2];
    v_empty_at bigint := (p_ring[2 * p_size + 3] + p_size) * p_width_ms;
begin
    if v_requests + 1 > p_requests then
        v_state := public.refuse_until(v_state, p_window, 'requests', p_requests, p_requests = 0,
                                       public.ring_frees_at(p_ring, p_size, p_width_ms, 0, v_requests + 1 - p_requests));
    end if;
    if v_tokens + p_need > p_tokens then
        v_state := public.refuse_until(v_state, p_window, 'tokens', p_tokens, p_need > p_tokens,
                                       public.ring_frees_at(p_ring, p_size, p_width_ms, p_size, v_tokens + p_need - p_tokens));
    end if;
    if p_requests - v_requests < v_state.request_left or (v_state.request_left is null and p_requests is not null) then
        v_state.request_limit := p_requests;
        v_state.request_left := p_requests - v_requests;
        v_state.request_reset_ms := v_empty_at;
    end if;
    if p_tokens - v_tokens < v_state.token_left or (v_state.token_left is null and p_tokens is not null) then
        v_state.token_limit := p_tokens;
        v_state.token_left := p_tokens - v_tokens;
        v_state.token_reset_ms := v_empty_at;
    end if;
    return v_state;
end $$;
revoke all on function public.check_window(public.limit_state, text, bigint[], int, bigint, bigint, bigint, bigint)
    from public, anon, authenticated;
grant execute on function public.check_window(public.limit_state, text, bigint[], int, bigint, bigint, bigint, bigint) to service_role;

create function public.check_limits(
    p_state public.limit_state, p_limits public.rate_limit_configs, p_usage public.rate_limit_usage, p_need bigint
) returns public.limit_state language plpgsql immutable as $$
declare
    v_state public.limit_state := p_state;
begin
    if p_limits.burst is not null then
        v_state := public.check_window(v_state, 'second', p_usage.burst_ring, 11, 100, p_limits.burst, null, p_need);
    end if;
    if p_limits.requests_per_minute is not null or p_limits.tokens_per_minute is not null then
        v_state := public.check_window(v_state, 'minute', p_usage.minute_ring, 7, 10000,
                                       p_limits.requests_per_minute, p_limits.tokens_per_minute, p_need);
    end if;
    if p_limits.requests_per_hour is not null or p_limits.tokens_per_hour is not null then
        v_state := public.check_window(v_state, 'hour', p_usage.hour_ring, 13, 300000,
                                       p_limits.requests_per_hour, p_limits.tokens_per_hour, p_need);
    end if;
    if p_limits.requests_per_day is not null or p_limits.tokens_per_day is not null then
        v_state := public.check_window(v_state, 'day', p_usage.day_ring, 25, 3600000,
                                       p_limits.requests_per_day, p_limits.tokens_per_day, p_need);
    end if;
    return v_state;
end $$;
revoke all on function public.check_limits(public.limit_state, public.rate_limit_configs, public.rate_limit_usage, bigint)
    from public, anon, authenticated;
grant execute on function public.check_limits(public.limit_state, public.rate_limit_configs, public.rate_limit_usage, bigint)
    to service_role;

-- One counter of a plan (a UTC day or month): refuses, and takes part in the search for the tightest limit.
create function public.check_plan_counter(
    p_state public.limit_state, p_window text, p_unit text, p_limit bigint, p_used bigint, p_need bigint, p_resets_ms bigint
) returns public.limit_state language plpgsql immutable as $$
declare
    v_state public.limit_state := p_state;
begin
    if p_limit is null then
        return v_state;
    end if;
    if p_used + p_need > p_limit then
        v_state := public.refuse_until(v_state, p_window, p_unit, p_limit, p_need > p_limit, p_resets_ms);
    end if;
    if p_unit = 'requests' and (v_state.request_left is null or p_limit - p_used < v_state.request_left) then
        v_state.request_limit := p_limit;
        v_state.request_left := p_limit - p_used;
        v_state.request_reset_ms := p_resets_ms;
    elsif p_unit = 'tokens' and (v_state.token_left is null or p_limit - p_used < v_state.token_left) then
        v_state.token_limit := p_limit;
        v_state.token_left := p_limit - p_used;
        v_state.token_reset_ms := p_resets_ms;
    end if;
    return v_state;
end $$;
revoke all on function public.check_plan_counter(public.limit_state, text, text, bigint, bigint, bigint, bigint)
    from public, anon, authenticated;
grant execute on function public.check_plan_counter(public.limit_state, text, text, bigint, bigint, bigint, bigint) to service_role;

create function public.check_plan(
    p_state public.limit_state, p_plan public.plans, p_usage public.rate_limit_usage, p_factor numeric, p_need bigint, p_now timestamptz
) returns public.limit_state language plpgsql stable as $$
declare
    v_state public.limit_state := p_state;
    v_day_ends bigint := extract(epoch from (date_trunc('day', p_now, 'UTC') + interval '1 day')) * 1000;
    v_month_ends bigint := extract(epoch from ((date_trunc('month', p_now at time zone 'UTC') + interval '1 month') at time zone 'UTC')) * 1000;
begin
    v_state := public.check_plan_counter(v_state, 'plan day', 'requests', floor(p_plan.daily_request_limit * p_factor)::bigint,
                                         p_usage.plan_day_requests, 1, v_day_ends);
    v_state := public.check_plan_counter(v_state, 'plan day', 'tokens', floor(p_plan.daily_token_limit * p_factor)::bigint,
                                         p_usage.plan_day_tokens, p_need, v_day_ends);
    v_state := public.check_plan_counter(v_state, 'plan month', 'requests', floor(p_plan.monthly_request_limit * p_factor)::bigint,
                                         p_usage.plan_month_requests, 1, v_month_ends);
    v_state := public.check_plan_counter(v_state, 'plan month', 'tokens', floor(p_plan.monthly_token_limit * p_factor)::bigint,
                                         p_usage.plan_month_tokens, p_need, v_month_ends);
    return v_state;
end $$;
revoke all on function public.check_plan(public.limit_state, public.plans, public.rate_limit_usage, numeric, bigint, timestamptz)
    from public, anon, authenticated;
grant execute on function public.check_plan(public.limit_state, public.plans, public.rate_limit_usage, numeric, bigint, timestamptz)
    to service_role;

-- A budget of another window is emptied, with the level that was told of it; rings and plan counters as before.
create function public.advance_usage(p_usage public.rate_limit_usage, p_now timestamptz, p_budget_window text)
returns public.rate_limit_usage language plpgsql stable as $$
declare
    v_usage public.rate_limit_usage := p_usage;
    v_ms bigint := extract(epoch from p_now) * 1000;
    v_day date := (p_now at time zone 'UTC')::date;
    v_month date := date_trunc('month', p_now at time zone 'UTC')::date;
    v_since timestamptz;
begin
    v_usage.burst_ring := public.advance_ring(v_usage.burst_ring, 11, v_ms / 100);
    v_usage.minute_ring := public.advance_ring(v_usage.minute_ring, 7, v_ms / 10000);
    v_usage.hour_ring := public.advance_ring(v_usage.hour_ring, 13, v_ms / 300000);
    v_usage.day_ring := public.advance_ring(v_usage.day_ring, 25, v_ms / 3600000);
    if v_usage.plan_day < v_day then
        v_usage.plan_day := v_day;
        v_usage.plan_day_requests := 0;
        v_usage.plan_day_tokens := 0;
    end if;
    if v_usage.plan_month < v_month then
        v_usage.plan_month := v_month;
        v_usage.plan_month_requests := 0;
        v_usage.plan_month_tokens := 0;
    end if;
    if p_budget_window is not null then
        v_since := public.budget_start(p_budget_window, p_now);
        if v_usage.budget_since < v_since then
            v_usage.budget_since := v_since;
            v_usage.budget_spent_nanos := 0;
            v_usage.budget_level := 0;
        end if;
    end if;
    return v_usage;
end $$;

create function public.budget_start(p_window text, p_now timestamptz) returns timestamptz
language sql stable as $$
    select case p_window
        when 'day' then date_trunc('day', p_now, 'UTC')
        when 'week' then date_trunc('week', p_now, 'UTC')
        when 'month' then date_trunc('month', p_now, 'UTC')
        else '-infinity'::timestamptz
    end
$$;
revoke all on function public.budget_start(text, timestamptz) from public, anon, authenticated;
grant execute on function public.budget_start(text, timestamptz) to service_role;
revoke all on function public.advance_usage(public.rate_limit_usage, timestamptz, text) from public, anon, authenticated;
grant execute on function public.advance_usage(public.rate_limit_usage, timestamptz, text) to service_role;


-- ============================================================================
-- admission
-- ============================================================================

-- Admission: one call decides for many requests, and a request is admitted only if this could hold an upper bound of its cost.
-- Expected refusals are returned rows. Time is clock_timestamp() after the locks. Every writer locks its users first, in id order.

create function public.scope_allows(p_scopes jsonb, p_verb text, p_resource text) returns boolean
language sql immutable as $$
    select coalesce((p_scopes -> p_verb) ?| array['*', p_resource], false)
$$;
revoke all on function public.scope_allows(jsonb, text, text) from public, anon, authenticated;
grant execute on function public.scope_allows(jsonb, text, text) to service_role;

create function public.domain_allowed(p_allowed text[], p_domain text) returns boolean
language sql immutable as $$
    select coalesce(bool_or(p_domain = d or (d like '*.%' and length(p_domain) > length(d) - 1 and right(p_domain, length(d) - 1) = substr(d, 2))), false)
    from unnest(p_allowed) as d
$$;
comment on function public.domain_allowed is 'Exact, or *.example.com for anything below example.com.';
revoke all on function public.domain_allowed(text[], text) from public, anon, authenticated;
grant execute on function public.domain_allowed(text[], text) to service_role;

create function public.models_allowed(p_allowed text[], p_models text[]) returns boolean
language sql immutable as $$
    select p_allowed is null or coalesce(bool_and(exists (
        select from unnest(p_allowed) as a where a = m or (right(a, 1) = '*' and starts_with(m, left(a, -1)))
    )), true) from unnest(p_models) as m
$$;
comment on function public.models_allowed is 'Every model must be allowed: exact, or a prefix that ends with *; null allows all.';
revoke all on function public.models_allowed(text[], text[]) from public, anon, authenticated;
grant execute on function public.models_allowed(text[], text[]) to service_role;

-- The id of the key with one of these hashes: current, or previous within its grace. A key of an older format that was moved is found
-- by its hash like any other, so that rotating it ends the old secret.
create function public.find_key(p_hashes text[]) returns bigint
language plpgsql stable as $$
declare
    v_id bigint;
begin
    select id into v_id from public.api_keys_new where key_hash = any (p_hashes) limit 1;
    if v_id is null then
        select id into v_id from public.api_keys_new
        where previous_key_hash = any (p_hashes) and previous_valid_until > clock_timestamp() limit 1;
    end if;
    return v_id;
end $$;
revoke all on function public.find_key(text[]) from public, anon, authenticated;
grant execute on function public.find_key(text[]) to service_role;

-- The owner must be locked: then the first of two concurrent first uses moves the key, and the second finds it moved.
create function public.move_legacy_key(p_legacy_hash text, p_hash text, p_secret_id text) returns public.api_keys_new
language plpgsql as $$
declare
    v_old public.api_keys;
    v_key public.api_keys_new;
begin
    select * into v_old from public.api_keys where key_sha256 = p_legacy_hash and moved_to is null for update;
    if not found then
        return null;
    end if;
    insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, environment_tag,
                                     scope_permissions, expiration_date, max_requests, is_active)
    values (v_old.user_id, left(v_old.key_name, 80) || ' (imported ' || v_old.id || ')', v_old.key_prefix, v_old.last4, p_hash, p_secret_id,
            v_old.environment_tag, v_old.scope_permissions, v_old.expiration_date, v_old.max_requests, v_old.is_active)
    returning * into v_key;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_key.id, null, null, null, null);
    update public.api_keys set moved_to = v_key.id where id = v_old.id;
    return v_key;
end $$;
revoke all on function public.move_legacy_key(text, text, text) from public, anon, authenticated;
grant execute on function public.move_legacy_key(text, text, text) to service_role;

-- Locks these users in id order and returns the ids that it locked: all of them, or, where another transaction holds one for longer
-- than lock_timeout, those that are free by then.
create function public.lock_users(p_ids bigint[]) returns bigint[]
language plpgsql set search_path = '' set lock_timeout = '250ms' as $$
declare
    v_locked bigint[];
begin
    begin
        select array_agg(l.id) into v_locked
        from (select u.id from public.users u where u.id = any (p_ids) order by u.id for no key update) as l;
    exception when lock_not_available then
        select array_agg(l.id) into v_locked
        from (select u.id from public.users u where u.id = any (p_ids) order by u.id for no key update skip locked) as l;
    end;
    return coalesce(v_locked, '{}');
end $$;
comment on function public.lock_users is 'A user that stays locked elsewhere must not keep its neighbours in a batch from being served.';
revoke all on function public.lock_users(bigint[]) from public, anon, authenticated;
grant execute on function public.lock_users(bigint[]) to service_role;

-- Writes what refusal_note made: all of a batch at once and in one order, as two batches that met in opposite orders would deadlock.
create function public.note_refusals(p_notes jsonb[]) returns void language sql set search_path = '' as $$
    insert into public.audit_logs as a (actor, action, target, user_id, key_id, ip, user_agent, request_id, refusal_minute, occurrences)
    select n.actor, n.action, 'api', (array_agg(n.user_id))[1], (array_agg(n.key_id))[1], (array_agg(n.ip))[1],
           (array_agg(n.user_agent))[1], (array_agg(n.request_id))[1], date_trunc('minute', clock_timestamp()), count(*)
    from unnest(p_notes) as j, jsonb_to_record(j) as n (actor text, action text, user_id bigint, key_id bigint, ip inet,
                                                        user_agent text, request_id uuid)
    group by n.actor, n.action
    order by n.actor collate "C", n.action collate "C"
    on conflict (actor, action, refusal_minute) where refusal_minute is not null
    do update set occurrences = a.occurrences + excluded.occurrences
$$;
revoke all on function public.note_refusals(jsonb[]) from public, anon, authenticated;
grant execute on function public.note_refusals(jsonb[]) to service_role;

create type public.admission_item as (
    request_id uuid,
    client_request_id text,
    hashes text[],
    secret_id text,
    legacy_hash text,
    prefix_environment text,
    verb text,
    resource text,
    address text,
    domain text,
    user_agent text,
    mode text,
    holds boolean,
    resent boolean,
    endpoint text,
    streamed boolean,
    models text[],
    prompt_estimate bigint,
    fixed_nanos numeric,
    output_nanos numeric,
    min_output bigint,
    max_output bigint,
    markup numeric,
    ttl_seconds int
);
revoke all on type public.admission_item from public, anon, authenticated;
grant usage on type public.admission_item to service_role;

-- A refusal's answer, with what the audit log is to hold of it (`note`, which is taken out before the answer leaves).
create function public.refusal(p_code text, p_item public.admission_item, p_user_id bigint, p_key_id bigint) returns jsonb
language sql stable as $$
    select jsonb_build_object('outcome', p_code, 'note', jsonb_build_object(
        -- Of IPv6 the /64: a host usually owns one whole, and would otherwise write a row for each of its addresses.
        'actor', coalesce('key:' || p_key_id, 'address:' || case family(p_item.address::inet)
            when 6 then network(set_masklen(p_item.address::inet, 64))::text else p_item.address end, 'unknown'), 'action', p_code, 'user_id', p_user_id,
        'key_id', p_key_id, 'ip', p_item.address::inet, 'user_agent', left(p_item.user_agent, 512), 'request_id', p_item.request_id))
$$;
revoke all on function public.refusal(text, public.admission_item, bigint, bigint) from public, anon, authenticated;
grant execute on function public.refusal(text, public.admission_item, bigint, bigint) to service_role;

-- Why this key may not be used for this at all, as a code, or null. Limits and money come later.
create function public.refuse_identity(p_key public.api_keys_new, p_user public.users, p_item public.admission_item, p_now timestamptz)
returns text language plpgsql stable as $$
begin
    -- The prefix chose the upstream, the row decides what is charged: they must agree, and a key of an older format is never a test key.
    if p_key.id is null or p_key.environment_tag <> coalesce(p_item.prefix_environment, p_key.environment_tag)
       or (p_key.environment_tag = 'test') <> (p_item.prefix_environment is not distinct from 'test') then
        return 'INVALID_KEY';
    elsif not p_key.is_active or p_key.revoked_at is not null then
        return 'INACTIVE_KEY';
    elsif p_key.expiration_date <= p_now then
        return 'EXPIRED_KEY';
    elsif p_user.deleted_at is not null then
        return 'INACTIVE_KEY';
    elsif cardinality(p_key.ip_allowlist) > 0 and not coalesce(p_item.address::inet <<= any (p_key.ip_allowlist), false) then
        return 'IP_NOT_ALLOWED';
    elsif cardinality(p_key.domain_referrers) > 0 and not public.domain_allowed(p_key.domain_referrers, p_item.domain) then
        return 'DOMAIN_NOT_ALLOWED';
    elsif not public.scope_allows(p_key.scope_permissions, p_item.verb, p_item.resource)
          or (p_item.verb = 'admin' and p_user.role <> 'admin') then
        return 'SCOPE_NOT_ALLOWED';
    elsif p_key.allowed_models is not null and not public.models_allowed(p_key.allowed_models, p_item.models) then
        return 'MODEL_NOT_ALLOWED';
    elsif not p_user.is_active then
        return 'ACCOUNT_SUSPENDED';
    end if;
    return null;
end $$;
revoke all on function public.refuse_identity(public.api_keys_new, public.users, public.admission_item, timestamptz)
    from public, anon, authenticated;
grant execute on function public.refuse_identity(public.api_keys_new, public.users, public.admission_item, timestamptz) to service_role;

create function public.current_plan(p_user public.users, p_now timestamptz) returns public.plans
language plpgsql stable as $$
declare
    v_plan public.plans;
begin
    select p.* into v_plan from public.user_plans up join public.plans p on p.id = up.plan_id
    where up.user_id = p_user.id and up.is_active and up.start_date <= p_now and p_now < up.end_date limit 1;
    if not found then
        select p.* into v_plan from public.plans p where p.slug = case when p_user.is_funded then 'pay-as-you-go' else 'free' end;
    end if;
    return v_plan;
end $$;
revoke all on function public.current_plan(public.users, timestamptz) from public, anon, authenticated;
grant execute on function public.current_plan(public.users, timestamptz) to service_role;

-- Up to four expired holds of a user, once in ten seconds, and slots and held budget counted anew from the journal.
create function public.recount_user(p_user_id bigint, p_key_id bigint, p_now timestamptz) returns jsonb
language plpgsql as $$
declare
    v_since timestamptz;
    v_expired jsonb;
begin
    select pending_since into v_since from public.rate_limit_usage
    where subject = 'user' and subject_id = p_user_id and recounted_at < p_now - interval '10 seconds';
    if not found then
        return null;
    end if;
    with pending as (
        select r.request_id, r.key_id, r.environment, r.generation_id, r.mode, r.hold_nanos, r.expires_at, r.created_at from public.usage_records r
        where r.user_id = p_user_id and r.created_at >= v_since and r.status = 'pending'
    ), recounted as (
        update public.rate_limit_usage u set recounted_at = p_now,
            pending_since = coalesce((select min(created_at) from pending), p_now),
            slots = (select count(*) from pending),
            test_slots = (select count(*) from pending where environment = 'test')
        where u.subject = 'user' and u.subject_id = p_user_id
    ), recounted_key as (
        update public.rate_limit_usage u set
            slots = (select count(*) from pending where key_id = p_key_id),
            budget_held_nanos = coalesce((select sum(hold_nanos) from pending where key_id = p_key_id), 0)
        where u.subject = 'key' and u.subject_id = p_key_id
    )
    select jsonb_agg(jsonb_build_object('request_id', e.request_id, 'generation_id', e.generation_id, 'mode', e.mode,
                                        'environment', e.environment)) into v_expired
    from (select * from pending where expires_at <= p_now order by random() limit 4) as e;
    return v_expired;
end $$;
comment on function public.recount_user is 'So that a crash leaks neither money nor slots for longer than its hold''s time to live, with no worker running.';
revoke all on function public.recount_user(bigint, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.recount_user(bigint, bigint, timestamptz) to service_role;

create function public.retry_after_seconds(p_frees_at_ms bigint, p_now timestamptz) returns bigint
language sql immutable as $$
    select greatest(1, ceil((p_frees_at_ms - extract(epoch from p_now) * 1000) / 1000.0))::bigint
$$;
revoke all on function public.retry_after_seconds(bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.retry_after_seconds(bigint, timestamptz) to service_role;

-- The limits' refusal of this request, or the state that allows it.
create function public.check_all_limits(
    p_key public.api_keys_new, p_user public.users, p_plan public.plans, p_key_limits public.rate_limit_configs,
    p_key_usage public.rate_limit_usage,
    p_user_usage public.rate_limit_usage, p_need bigint, p_now timestamptz
) returns public.limit_state language plpgsql stable as $$
declare
    v_state public.limit_state;
    v_limits public.rate_limit_configs;
    v_running bigint := p_user_usage.slots;
begin
    v_state := public.check_plan(v_state, p_plan, p_user_usage,
                                 coalesce((p_plan.environment_factors ->> p_key.environment_tag)::numeric, 1), p_need, p_now);
    if p_key_limits.subject is not null then
        v_state := public.check_limits(v_state, p_key_limits, p_key_usage, p_need);
        if v_state.refused_window is null and p_key_usage.slots >= p_key_limits.concurrency then
            v_state.refused_window := 'concurrency';
            v_state.refused_limit := p_key_limits.concurrency;
        end if;
    end if;
    select * into v_limits from public.rate_limit_configs where subject = 'user' and subject_id = p_user.id;
    if not found then
        select * into v_limits from public.rate_limit_configs where subject = 'default' and subject_id = 0;
    end if;
    v_state := public.check_limits(v_state, v_limits, p_user_usage, p_need);
    v_limits.concurrency := least(v_limits.concurrency, p_plan.concurrency);
    if p_key.environment_tag = 'test' and p_user_usage.test_slots >= 4 then
        v_running := greatest(v_running, 4);
        v_limits.concurrency := least(v_limits.concurrency, 4);
    end if;
    if v_state.refused_window is null and v_running >= v_limits.concurrency then
        v_state.refused_window := 'concurrency';
        v_state.refused_limit := v_limits.concurrency;
    end if;
    if v_state.refused_window = 'concurrency' then
        v_state.never := v_state.refused_limit = 0;
        v_state.frees_at_ms := floor(extract(epoch from p_now) * 1000) + 1000;
    end if;
    return v_state;
end $$;
revoke all on function public.check_all_limits(public.api_keys_new, public.users, public.plans, public.rate_limit_configs, public.rate_limit_usage,
    public.rate_limit_usage, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.check_all_limits(public.api_keys_new, public.users, public.plans, public.rate_limit_configs, public.rate_limit_usage,
    public.rate_limit_usage, bigint, timestamptz) to service_role;

-- How many output tokens this amount covers: p_max if it covers them all, else what it covers (below p_min is a refusal).
create function public.affordable_output(p_item public.admission_item, p_available_nanos bigint) returns bigint
language plpgsql immutable as $$
declare
    v_left numeric;
begin
    if ceil((p_item.fixed_nanos + p_item.output_nanos * p_item.max_output) * p_item.markup) <= p_available_nanos then
        return p_item.max_output;
    end if;
    -- div() is exact where / would round, and a hold that is a nano-dollar too high would break users_never_overdrawn.
    v_left := p_available_nanos - p_item.fixed_nanos * p_item.markup;
    if p_item.output_nanos = 0 or v_left < 0 then
        return -1;
    end if;
    return least(p_item.max_output, div(v_left, p_item.output_nanos * p_item.markup))::bigint;
end $$;
revoke all on function public.affordable_output(public.admission_item, bigint) from public, anon, authenticated;
grant execute on function public.affordable_output(public.admission_item, bigint) to service_role;

create function public.limits_json(p_state public.limit_state, p_now timestamptz) returns jsonb
language sql immutable as $$
    select jsonb_build_object(
        'request_limit', p_state.request_limit, 'request_left', p_state.request_left,
        'request_reset', public.retry_after_seconds(p_state.request_reset_ms, p_now),
        'token_limit', p_state.token_limit, 'token_left', p_state.token_left,
        'token_reset', public.retry_after_seconds(p_state.token_reset_ms, p_now))
$$;
revoke all on function public.limits_json(public.limit_state, timestamptz) from public, anon, authenticated;
grant execute on function public.limits_json(public.limit_state, timestamptz) to service_role;

-- Holds, counts and writes the pending record of a request that nothing refuses.
create function public.record_admission(
    p_item public.admission_item, p_key public.api_keys_new, p_key_usage public.rate_limit_usage, p_user_usage public.rate_limit_usage,
    p_granted bigint, p_hold bigint, p_now timestamptz
) returns void language plpgsql as $$
declare
    v_need bigint := p_item.prompt_estimate;
    v_test int := (p_key.environment_tag = 'test')::int;
begin
    insert into public.usage_records (request_id, client_request_id, user_id, key_id, mode, environment, endpoint, model, prompt_estimate,
                                      output_granted, hold_nanos, markup, streamed, created_at, expires_at)
    values (p_item.request_id, left(p_item.client_request_id, 256), p_key.user_id, p_key.id, p_item.mode, p_key.environment_tag, p_item.endpoint,
            p_item.models[1], v_need, p_granted, p_hold, p_item.markup, p_item.streamed, p_now,
            p_now + make_interval(secs => p_item.ttl_seconds));
    if p_hold > 0 then
        update public.users set held_nanos = held_nanos + p_hold where id = p_key.user_id;
    end if;
    update public.rate_limit_usage set
        burst_ring = public.count_in_ring(p_user_usage.burst_ring, 11, null, 1, v_need),
        minute_ring = public.count_in_ring(p_user_usage.minute_ring, 7, null, 1, v_need),
        hour_ring = public.count_in_ring(p_user_usage.hour_ring, 13, null, 1, v_need),
        day_ring = public.count_in_ring(p_user_usage.day_ring, 25, null, 1, v_need),
        plan_day = p_user_usage.plan_day, plan_day_requests = p_user_usage.plan_day_requests + 1,
        plan_day_tokens = p_user_usage.plan_day_tokens + v_need,
        plan_month = p_user_usage.plan_month, plan_month_requests = p_user_usage.plan_month_requests + 1,
        plan_month_tokens = p_user_usage.plan_month_tokens + v_need,
        slots = slots + 1, test_slots = test_slots + v_test, requests_used = requests_used + 1, last_used_at = p_now,
        pending_since = case when slots = 0 then p_now else least(pending_since, p_now) end
    where subject = 'user' and subject_id = p_key.user_id;
    update public.rate_limit_usage set
        burst_ring = public.count_in_ring(p_key_usage.burst_ring, 11, null, 1, v_need),
        minute_ring = public.count_in_ring(p_key_usage.minute_ring, 7, null, 1, v_need),
        hour_ring = public.count_in_ring(p_key_usage.hour_ring, 13, null, 1, v_need),
        day_ring = public.count_in_ring(p_key_usage.day_ring, 25, null, 1, v_need),
        slots = slots + 1, requests_used = requests_used + 1, last_used_at = p_now,
        budget_since = p_key_usage.budget_since, budget_spent_nanos = p_key_usage.budget_spent_nanos,
        budget_held_nanos = budget_held_nanos + p_hold
    where subject = 'key' and subject_id = p_key.id;
end $$;
revoke all on function public.record_admission(public.admission_item, public.api_keys_new, public.rate_limit_usage,
    public.rate_limit_usage, bigint, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.record_admission(public.admission_item, public.api_keys_new, public.rate_limit_usage,
    public.rate_limit_usage, bigint, bigint, timestamptz) to service_role;

create function public.refuse_for_limits(
    p_item public.admission_item, p_key public.api_keys_new, p_state public.limit_state, p_now timestamptz
) returns jsonb language plpgsql as $$
begin
    return jsonb_build_object(
        'outcome', case when p_state.refused_window = 'concurrency' then 'concurrency'
                        when p_state.refused_window like 'plan %' then 'plan_limit' else 'rate_limit' end,
        'window', p_state.refused_window, 'unit', p_state.refused_unit, 'limit', p_state.refused_limit,
        'need', p_item.prompt_estimate, 'never', p_state.never, 'retry_after', public.retry_after_seconds(p_state.frees_at_ms, p_now),
        'limits', public.limits_json(p_state, p_now),
        'expired', case when p_state.refused_window = 'concurrency'
                        then public.recount_user(p_key.user_id, p_key.id, p_item.end_user, p_now) end);
end $$;
revoke all on function public.refuse_for_limits(public.admission_item, public.api_keys_new, public.limit_state, timestamptz)
    from public, anon, authenticated;
grant execute on function public.refuse_for_limits(public.admission_item, public.api_keys_new, public.limit_state, timestamptz)
    to service_role;

-- The answer to a request that passed the identity checks: limits, cache, budgets and credits decide, in this order.
create function public.admit_checked(
    p_item public.admission_item, p_key public.api_keys_new, p_user public.users, p_now timestamptz
) returns jsonb language plpgsql as $$
declare
    v_key_usage public.rate_limit_usage;
    v_key_limits public.rate_limit_configs;
    v_user_usage public.rate_limit_usage;
    v_plan public.plans := public.current_plan(p_user, p_now);
    v_state public.limit_state;
    v_test boolean := p_key.environment_tag = 'test';
    v_provider_key text;
    v_cache_ttl int := p_key.cache_ttl_seconds;
    v_cached public.stored_answers;
    v_budget bigint;
    v_end_user_left bigint;
    v_available bigint := p_user.credits_nanos - p_user.held_nanos;
    v_granted bigint := p_item.max_output;
    v_hold bigint := 0;
    v_answer jsonb;
begin
    select * into v_user_usage from public.rate_limit_usage where subject = 'user' and subject_id = p_user.id;
    if not found then -- without counters nothing would be limited
        insert into public.rate_limit_usage (subject, subject_id) values ('user', p_user.id) returning * into v_user_usage;
    end if;
    select * into v_key_usage from public.rate_limit_usage where subject = 'key' and subject_id = p_key.id;
    if not found then
        insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
        values ('key', p_key.id, null, null, null, null)
        returning * into v_key_usage;
    end if;
    select * into v_key_limits from public.rate_limit_configs where subject = 'key' and subject_id = p_key.id;
    if found and v_key_usage.day_ring is null then
        v_key_usage.burst_ring := public.empty_ring(11);
        v_key_usage.minute_ring := public.empty_ring(7);
        v_key_usage.hour_ring := public.empty_ring(13);
        v_key_usage.day_ring := public.empty_ring(25);
    end if;
    v_user_usage := public.advance_usage(v_user_usage, p_now, null);
    v_key_usage := public.advance_usage(v_key_usage, p_now, p_key.budget_window);
    if v_key_usage.requests_used >= p_key.max_requests then
        return public.refusal('REQUEST_LIMIT_EXCEEDED', p_item, p_user.id, p_key.id) || jsonb_build_object('limit', p_key.max_requests);
    elsif v_plan.allowed_models is not null and not public.models_allowed(v_plan.allowed_models, p_item.models) then
        return jsonb_build_object('outcome', 'MODEL_NOT_ALLOWED');
    elsif not v_test and p_user.subscription_status = 'trial' and p_user.trial_expires_at <= p_now then
        return jsonb_build_object('outcome', 'trial_expired');
    end if;
    if p_item.cache is not null then
        v_cache_ttl := coalesce((p_item.cache ->> 'ttl_seconds')::int, v_cache_ttl);
        if v_cache_ttl is not null then
            v_cached := public.find_cached(p_item.cache, p_user.id, p_now);
        end if;
    end if;
    v_state := public.check_all_limits(p_key, p_user, v_plan, v_key_limits, v_key_usage, v_user_usage,
                                       case when v_cached.id is null then p_item.prompt_estimate else 0 end, p_now);
    if v_state.refused_window is not null then
        return public.refuse_for_limits(p_item, p_key, v_state, p_now);
    end if;
    v_state.request_left := v_state.request_left - 1;
    if v_cached.id is not null then
        perform public.record_admission(p_item, p_key, v_key_usage, v_user_usage, 0, 0, false, false, p_user.credits_nanos, p_now);
        return public.cached_json(v_cached, p_now) || jsonb_build_object(
            'user_id', p_user.id, 'key_id', p_key.id, 'environment', p_key.environment_tag, 'status', 'completed', 'cost_nanos', 0,
            'balance_after_nanos', p_user.credits_nanos, 'limits', public.limits_json(v_state, p_now));
    end if;
    if p_user.has_provider_key and p_item.byok and not v_test then
        select encrypted_key into v_provider_key from public.provider_keys where user_id = p_user.id and is_active;
    end if;
    if not v_test and v_provider_key is null then
        v_budget := p_key.budget_nanos - v_key_usage.budget_spent_nanos - v_key_usage.budget_held_nanos;
        if p_user.has_end_user_budgets and p_item.end_user is not null then
            v_end_user_left := public.end_user_left(p_user.id, p_item.end_user, p_now);
        end if;
        v_granted := public.affordable_output(p_item, greatest(0, least(v_available, v_budget, v_end_user_left)));
        if v_granted < p_item.min_output then
            return public.refuse_for_money(p_item, p_user.credits_nanos, p_user.held_nanos, v_available, v_budget, v_end_user_left, v_granted)
                || jsonb_build_object(
                    'limits', public.limits_json(v_state, p_now),
                    'expired', case when p_user.held_nanos > 0 then public.recount_user(p_user.id, p_key.id, p_item.end_user, p_now) end);
        end if;
        v_hold := ceil((p_item.fixed_nanos + p_item.output_nanos * v_granted) * p_item.markup);
    end if;
    perform public.record_admission(p_item, p_key, v_key_usage, v_user_usage, v_granted, v_hold, v_provider_key is not null,
                                    v_end_user_left is not null, null, p_now);
    v_state.token_left := v_state.token_left - p_item.prompt_estimate;
    v_answer := jsonb_build_object('outcome', 'admitted', 'user_id', p_user.id, 'key_id', p_key.id, 'environment', p_key.environment_tag,
                                   'granted_output', v_granted, 'hold_nanos', v_hold, 'balance_nanos', p_user.credits_nanos,
                                   'limits', public.limits_json(v_state, p_now));
    if v_provider_key is not null then
        v_answer := v_answer || jsonb_build_object('byok', true, 'provider_key', v_provider_key);
    end if;
    if v_cache_ttl is not null then
        v_answer := v_answer || jsonb_build_object('cache_ttl', v_cache_ttl);
    end if;
    return v_answer;
end $$;
revoke all on function public.admit_checked(public.admission_item, public.api_keys_new, public.users, timestamptz)
    from public, anon, authenticated;
grant execute on function public.admit_checked(public.admission_item, public.api_keys_new, public.users, timestamptz) to service_role;

-- The first answer to a request id that was sent before, when its reply was lost.
create function public.repeat_admission(p_item public.admission_item) returns jsonb
language plpgsql stable as $$
declare
    v_record public.usage_records;
    v_cached public.stored_answers;
    v_answer jsonb;
begin
    select * into v_record from public.usage_records
    where request_id = p_item.request_id and key_id = public.find_key(p_item.hashes);
    if not found then
        return null;
    end if;
    v_answer := jsonb_build_object('outcome', 'admitted', 'user_id', v_record.user_id, 'key_id', v_record.key_id,
                                   'environment', v_record.environment, 'granted_output', v_record.output_granted,
                                   'hold_nanos', v_record.hold_nanos, 'limits', '{}'::jsonb,
                                   'balance_nanos', (select u.credits_nanos from public.users u where u.id = v_record.user_id));
    if v_record.cache_hit then
        select * into v_cached from public.stored_answers
        where user_id = v_record.user_id and kind = 'cache' and place = p_item.cache ->> 'place';
        if not found then -- cleared within moments: it is settled, and nothing more can be had under its id
            return jsonb_build_object('outcome', 'busy');
        end if;
        return v_answer || public.cached_json(v_cached, clock_timestamp())
            || jsonb_build_object('status', 'completed', 'cost_nanos', 0, 'balance_after_nanos', v_record.balance_after_nanos);
    end if;
    if v_record.byok then
        v_answer := v_answer || public.hold_json(v_record);
    end if;
    return v_answer || (select jsonb_strip_nulls(jsonb_build_object(
        'cache_ttl', coalesce((p_item.cache ->> 'ttl_seconds')::int, k.cache_ttl_seconds)))
        from public.api_keys_new k where k.id = v_record.key_id);
end $$;
comment on function public.repeat_admission is 'The first answer to a request id that was sent before, when its reply was lost.';
revoke all on function public.repeat_admission(public.admission_item) from public, anon, authenticated;
grant execute on function public.repeat_admission(public.admission_item) to service_role;

create function public.admit_one(p_item public.admission_item, p_locked bigint[]) returns jsonb
language plpgsql as $$
declare
    v_now timestamptz := clock_timestamp();
    v_key public.api_keys_new;
    v_user public.users;
    v_owner bigint;
    v_refusal text;
    v_answer jsonb;
begin
    if p_item.resent then
        v_answer := public.repeat_admission(p_item);
        if v_answer is not null then
            return v_answer;
        end if;
    end if;
    select * into v_key from public.api_keys_new where id = public.find_key(p_item.hashes);
    if not found and p_item.legacy_hash is not null then
        select user_id into v_owner from public.api_keys where key_sha256 = p_item.legacy_hash and moved_to is null;
        if v_owner = any (p_locked) then
            v_key := public.move_legacy_key(p_item.legacy_hash, p_item.hashes[1], p_item.secret_id);
        end if;
    end if;
    v_owner := coalesce(v_key.user_id, v_owner);
    if v_owner is not null and v_owner <> all (p_locked) then
        return jsonb_build_object('outcome', 'busy');
    end if;
    select * into v_user from public.users where id = v_key.user_id;
    if not exists (select from public.gateway_state where mode = p_item.mode) then
        return jsonb_build_object('outcome', 'wrong_mode');
    end if;
    v_refusal := public.refuse_identity(v_key, v_user, p_item, v_now);
    if v_refusal is not null then
        return public.refusal(v_refusal, p_item, v_user.id, v_key.id);
    end if;
    if v_key.hash_secret_id <> p_item.secret_id and v_key.key_hash = any (p_item.hashes) then
        update public.api_keys_new set key_hash = p_item.hashes[1], hash_secret_id = p_item.secret_id where id = v_key.id;
    end if;
    if p_item.holds then
        if p_item.idempotency is null then
            return public.admit_checked(p_item, v_key, v_user, v_now);
        end if;
        v_answer := public.check_idempotency(p_item, v_key, v_now);
        if v_answer is null then
            v_answer := public.admit_checked(p_item, v_key, v_user, v_now);
            if v_answer ->> 'outcome' in ('admitted', 'cached') then -- a refusal leaves the key free
                perform public.claim_idempotency(p_item, v_user.id, v_answer ->> 'answer', v_now);
            end if;
        end if;
        return v_answer;
    end if;
    return jsonb_build_object('outcome', 'verified', 'user_id', v_user.id, 'key_id', v_key.id, 'environment', v_key.environment_tag,
                              'role', v_user.role, 'outdated', v_key.key_hash <> all (p_item.hashes), 'key_name', v_key.key_name, 'key_prefix', v_key.key_prefix, 'last4', v_key.last4,
                              'scopes', v_key.scope_permissions,
                              'limits', public.verified_limits(v_key, v_user, v_now));
end $$;
revoke all on function public.admit_one(public.admission_item, bigint[]) from public, anon, authenticated;
grant execute on function public.admit_one(public.admission_item, bigint[]) to service_role;

-- The users whose keys these items present, before anything is known to be well-formed.
create function public.admission_users(p_items jsonb) returns bigint[] language sql stable as $$
    select array_agg(coalesce(
        (select n.user_id from public.api_keys_new n where n.id = public.find_key(h.hashes) limit 1),
        (select l.user_id from public.api_keys l where l.key_sha256 = i ->> 'legacy_hash' and l.moved_to is null limit 1)))
    from jsonb_array_elements(p_items) as i, lateral (
        select case jsonb_typeof(i -> 'hashes') when 'array' then array(select jsonb_array_elements_text(i -> 'hashes')) end as hashes
    ) as h
$$;
revoke all on function public.admission_users(jsonb) from public, anon, authenticated;
grant execute on function public.admission_users(jsonb) to service_role;

create function public.admit_requests(p_items jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_locked bigint[] := public.lock_users(public.admission_users(p_items));
    v_raw jsonb;
    v_answer jsonb;
    v_answers jsonb[] := '{}';
    v_notes jsonb[] := '{}';
begin
    for v_raw in select i from jsonb_array_elements(p_items) as i loop
        begin
            v_answer := public.admit_one(jsonb_populate_record(null::public.admission_item, v_raw), v_locked);
        exception when others then
            v_answer := jsonb_build_object('outcome', 'failed', 'sqlstate', sqlstate, 'message', sqlerrm);
        end;
        if v_answer ? 'note' then
            v_notes := v_notes || (v_answer -> 'note');
        end if;
        v_answers := v_answers || (v_answer - 'note' || jsonb_build_object('request_id', v_raw -> 'request_id'));
    end loop;
    if cardinality(v_notes) > 0 then
        perform public.note_refusals(v_notes);
    end if;
    return to_jsonb(v_answers);
end $$;
comment on function public.admit_requests is
    'Decides for each item (admission_item) in order. Answers carry request_id and outcome: admitted, verified, busy, wrong_mode, failed, '
    'or the code of a refusal.';
revoke all on function public.admit_requests(jsonb) from public, anon, authenticated;
grant execute on function public.admit_requests(jsonb) to service_role;


-- ============================================================================
-- settlement
-- ============================================================================

-- Settlement: finishes records, releases holds, charges, corrects the token counters. Idempotent per request id.
-- due = ceil(billable x the record's markup); cost = min(due, own hold + unheld credits); overrun = due - cost.

create type public.settlement_item as (
    request_id uuid,
    status text,
    source text,
    billable_nanos numeric,
    prompt_tokens bigint,
    completion_tokens bigint,
    cached_tokens bigint,
    reasoning_tokens bigint,
    model_used text,
    provider text,
    finish_reason text,
    error_code text,
    latency_ms bigint,
    time_to_first_token_ms bigint,
    generation_id text
);
revoke all on type public.settlement_item from public, anon, authenticated;
grant usage on type public.settlement_item to service_role;

create function public.correct_ring(p_ring bigint[], p_size int, p_admitted bigint, p_now bigint, p_delta bigint) returns bigint[]
language plpgsql immutable as $$
declare
    v_ring bigint[] := public.advance_ring(p_ring, p_size, p_now);
begin
    return public.count_in_ring(v_ring, p_size, case when p_delta < 0 then p_admitted end, 0, p_delta);
end $$;
comment on function public.correct_ring is
    'More tokens than estimated count now; fewer are taken back where the estimate was counted, so that no bucket falls below zero.';
revoke all on function public.correct_ring(bigint[], int, bigint, bigint, bigint) from public, anon, authenticated;
grant execute on function public.correct_ring(bigint[], int, bigint, bigint, bigint) to service_role;

create function public.release_counters(
    p_record public.usage_records, p_budget_window text, p_delta bigint, p_cost bigint, p_now timestamptz
) returns void language plpgsql as $$
declare
    v_then bigint := extract(epoch from p_record.created_at) * 1000;
    v_ms bigint := extract(epoch from p_now) * 1000;
    v_day date := (p_record.created_at at time zone 'UTC')::date;
    v_month date := date_trunc('month', p_record.created_at at time zone 'UTC')::date;
    v_first boolean := p_record.status = 'pending';
    v_released int := v_first::int;
    v_since timestamptz := public.budget_start(p_budget_window, p_now);
begin
    update public.rate_limit_usage set
        minute_ring = public.correct_ring(minute_ring, 7, v_then / 10000, v_ms / 10000, p_delta),
        hour_ring = public.correct_ring(hour_ring, 13, v_then / 300000, v_ms / 300000, p_delta),
        day_ring = public.correct_ring(day_ring, 25, v_then / 3600000, v_ms / 3600000, p_delta),
        plan_day_tokens = greatest(0, plan_day_tokens + case when plan_day = v_day or p_delta > 0 then p_delta else 0 end),
        plan_month_tokens = greatest(0, plan_month_tokens + case when plan_month = v_month or p_delta > 0 then p_delta else 0 end),
        slots = greatest(0, slots - v_released),
        test_slots = greatest(0, test_slots - case when p_record.environment = 'test' then v_released else 0 end)
    where subject = 'user' and subject_id = p_record.user_id;
    update public.rate_limit_usage set
        minute_ring = public.correct_ring(minute_ring, 7, v_then / 10000, v_ms / 10000, p_delta),
        hour_ring = public.correct_ring(hour_ring, 13, v_then / 300000, v_ms / 300000, p_delta),
        day_ring = public.correct_ring(day_ring, 25, v_then / 3600000, v_ms / 3600000, p_delta),
        slots = greatest(0, slots - v_released),
        budget_spent_nanos = greatest(0, case when budget_since < v_since then 0 else budget_spent_nanos end + p_cost),
        budget_since = greatest(budget_since, v_since),
        budget_held_nanos = greatest(0, budget_held_nanos - case when v_first then p_record.hold_nanos else 0 end)
    where subject = 'key' and subject_id = p_record.key_id;
end $$;
revoke all on function public.release_counters(public.usage_records, text, bigint, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.release_counters(public.usage_records, text, bigint, bigint, timestamptz) to service_role;

create function public.write_settlement(
    p_item public.settlement_item, p_cost bigint, p_overrun bigint, p_upstream bigint, p_now timestamptz
) returns void language sql as $$
    update public.usage_records set
        status = p_item.status, settlement_source = p_item.source, settled_at = p_now,
        upstream_cost_nanos = p_upstream, cost_nanos = p_cost, overrun_nanos = p_overrun,
        prompt_tokens = p_item.prompt_tokens, completion_tokens = p_item.completion_tokens,
        cached_tokens = p_item.cached_tokens, reasoning_tokens = p_item.reasoning_tokens,
        model_used = coalesce(p_item.model_used, model_used), provider = coalesce(p_item.provider, provider),
        finish_reason = coalesce(p_item.finish_reason, finish_reason), error_code = coalesce(p_item.error_code, error_code),
        latency_ms = coalesce(latency_ms, p_item.latency_ms),
        time_to_first_token_ms = coalesce(time_to_first_token_ms, p_item.time_to_first_token_ms),
        generation_id = coalesce(left(p_item.generation_id, 256), generation_id)
    where request_id = p_item.request_id
$$;
revoke all on function public.write_settlement(public.settlement_item, bigint, bigint, bigint, timestamptz)
    from public, anon, authenticated;
grant execute on function public.write_settlement(public.settlement_item, bigint, bigint, bigint, timestamptz) to service_role;

-- What is left of play money's hold when a database has gone live: it leaves the account, as the unheld play credits did.
create function public.expire_play_rest(p_record public.usage_records, p_cost bigint) returns void
language plpgsql as $$
declare
    v_rest bigint := p_record.hold_nanos - p_cost;
    v_balance bigint;
begin
    if p_record.mode <> 'sandbox' or p_record.status <> 'pending' or v_rest <= 0
       or not exists (select from public.gateway_state where mode = 'live') then
        return;
    end if;
    -- Of a deleted account the rest has left already, as the hold was released.
    select least(v_rest, credits_nanos - held_nanos) into v_rest from public.users where id = p_record.user_id;
    if v_rest <= 0 then
        return;
    end if;
    update public.users set credits_nanos = credits_nanos - v_rest where id = p_record.user_id returning credits_nanos into v_balance;
    insert into public.credit_transactions (user_id, kind, amount_nanos, balance_after_nanos, actor, reason)
    values (p_record.user_id, 'expiry', -v_rest, v_balance, 'gateway', 'play credits end when the gateway goes live');
end $$;
revoke all on function public.expire_play_rest(public.usage_records, bigint) from public, anon, authenticated;
grant execute on function public.expire_play_rest(public.usage_records, bigint) to service_role;

create function public.settlement_answer(p_request_id uuid, p_outcome text) returns jsonb
language sql stable as $$
    select jsonb_build_object('outcome', p_outcome, 'status', r.status, 'cost_nanos', r.cost_nanos, 'overrun_nanos', r.overrun_nanos,
                              'balance_nanos', u.credits_nanos, 'user_id', r.user_id)
    from public.usage_records r join public.users u on u.id = r.user_id where r.request_id = p_request_id
$$;
revoke all on function public.settlement_answer(uuid, text) from public, anon, authenticated;
grant execute on function public.settlement_answer(uuid, text) to service_role;

-- Tokens count as far as they are known: embeddings have a prompt and no completion. (greatest() passes over nulls.)
create function public.counted_tokens(p_prompt bigint, p_completion bigint, p_estimate bigint) returns bigint
language sql immutable as $$
    select case when p_prompt is null and p_completion is null then p_estimate
                else least(greatest(coalesce(p_prompt, 0)::numeric + coalesce(p_completion, 0), 0), 1e12)::bigint end
$$;
revoke all on function public.counted_tokens(bigint, bigint, bigint) from public, anon, authenticated;
grant execute on function public.counted_tokens(bigint, bigint, bigint) to service_role;

-- Under the user's own upstream key nothing is due: what the upstream reports is recorded for them.
create function public.settle_one(p_item public.settlement_item, p_locked bigint[]) returns jsonb
language plpgsql as $$
declare
    v_now timestamptz := clock_timestamp();
    v_record public.usage_records;
    v_held bigint := 0;
    v_upstream bigint := ceil(p_item.billable_nanos);
    v_due bigint;
    v_cost bigint;
    v_unheld bigint;
    v_before bigint;
    v_balance bigint;
    v_deleted_at timestamptz;
begin
    select * into v_record from public.usage_records where request_id = p_item.request_id;
    if not found then
        return jsonb_build_object('outcome', 'unknown');
    elsif v_record.user_id <> all (p_locked) then
        return jsonb_build_object('outcome', 'busy');
    elsif v_record.status <> 'pending' and (v_record.settlement_source <> 'none' or p_item.source = 'none') then
        return public.settlement_answer(p_item.request_id, 'repeated');
    end if;
    if v_record.status = 'pending' then
        v_held := v_record.hold_nanos;
        v_before := v_record.prompt_estimate;
    else
        v_before := public.counted_tokens(v_record.prompt_tokens, v_record.completion_tokens, v_record.prompt_estimate);
    end if;
    if v_record.environment = 'test' then
        v_upstream := 0;
        v_due := 0;
    elsif v_record.byok then
        v_due := 0;
    else
        v_due := ceil(p_item.billable_nanos * v_record.markup);
    end if;
    -- Unheld credits of a live database are real money: play money's requests cost no more than what was held for them.
    select case when v_record.mode = s.mode then u.credits_nanos - u.held_nanos else 0 end into v_unheld
    from public.users u, public.gateway_state s where u.id = v_record.user_id;
    v_cost := least(v_due, v_record.cost_nanos + v_held + v_unheld);
    update public.users set credits_nanos = credits_nanos - (v_cost - v_record.cost_nanos), held_nanos = held_nanos - v_held
    where id = v_record.user_id returning credits_nanos, deleted_at into v_balance, v_deleted_at;
    perform public.release_counters(
        v_record, public.counted_tokens(p_item.prompt_tokens, p_item.completion_tokens, v_record.prompt_estimate) - v_before,
        v_cost - v_record.cost_nanos, v_now);
    if v_record.mode = 'sandbox' then
        perform public.expire_play_rest(v_record, v_cost);
    end if;
    if v_record.mode = 'sandbox' or v_deleted_at is not null then -- more may have left the account just now
        select credits_nanos into v_balance from public.users where id = v_record.user_id;
    end if;
    update public.usage_records set
        status = p_item.status, settlement_source = p_item.source, settled_at = v_now,
        upstream_cost_nanos = v_upstream, cost_nanos = v_cost, overrun_nanos = v_due - v_cost, balance_after_nanos = v_balance,
        prompt_tokens = p_item.prompt_tokens, completion_tokens = p_item.completion_tokens,
        cached_tokens = p_item.cached_tokens, reasoning_tokens = p_item.reasoning_tokens,
        model_used = coalesce(p_item.model_used, model_used), provider = coalesce(p_item.provider, provider),
        finish_reason = coalesce(p_item.finish_reason, finish_reason), error_code = coalesce(p_item.error_code, error_code),
        latency_ms = coalesce(latency_ms, p_item.latency_ms),
        time_to_first_token_ms = coalesce(time_to_first_token_ms, p_item.time_to_first_token_ms),
        generation_id = coalesce(left(p_item.generation_id, 256), generation_id)
    where request_id = p_item.request_id;
    if v_record.has_idempotency_key and v_record.status = 'pending' then
        perform public.finish_idempotency(v_record.request_id, p_item.stored_answer, v_cost > 0 or (v_record.byok and v_upstream > 0));
    end if;
    if p_item.cache is not null and p_item.stored_answer is not null and p_item.status = 'completed' then
        perform public.keep_in_cache(p_item.cache, v_record, p_item.stored_answer, v_now);
    end if;
    return jsonb_build_object('outcome', 'settled', 'status', p_item.status, 'cost_nanos', v_cost, 'overrun_nanos', v_due - v_cost,
                              'balance_nanos', v_balance, 'user_id', v_record.user_id);
end $$;
revoke all on function public.settle_one(public.settlement_item, bigint[]) from public, anon, authenticated;
grant execute on function public.settle_one(public.settlement_item, bigint[]) to service_role;

-- The users whose requests these items name, before anything is known to be well-formed.
create function public.settlement_users(p_items jsonb) returns bigint[] language sql stable as $$
    select array_agg((
        select r.user_id from public.usage_records r
        where r.request_id = case when i ->> 'request_id' ~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                                  then (i ->> 'request_id')::uuid end limit 1))
    from jsonb_array_elements(p_items) as i
$$;
revoke all on function public.settlement_users(jsonb) from public, anon, authenticated;
grant execute on function public.settlement_users(jsonb) to service_role;

create function public.settle_requests(p_items jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_locked bigint[] := public.lock_users(public.settlement_users(p_items));
    v_raw jsonb;
    v_answer jsonb;
    v_answers jsonb[] := '{}';
begin
    for v_raw in select i from jsonb_array_elements(p_items) as i loop
        begin
            v_answer := public.settle_one(jsonb_populate_record(null::public.settlement_item, v_raw), v_locked);
        exception when others then
            v_answer := jsonb_build_object('outcome', 'failed', 'sqlstate', sqlstate, 'message', sqlerrm);
        end;
        v_answers := v_answers || (v_answer || jsonb_build_object('request_id', v_raw -> 'request_id'));
    end loop;
    return to_jsonb(v_answers);
end $$;
comment on function public.settle_requests is
    'Finishes each item (settlement_item). Answers carry request_id and outcome: settled, repeated (the first settlement stands), '
    'unknown, busy or failed.';
revoke all on function public.settle_requests(jsonb) from public, anon, authenticated;
grant execute on function public.settle_requests(jsonb) to service_role;

create function public.note_generation(p_item public.settlement_item, p_locked bigint[]) returns text
language plpgsql set search_path = '' as $$
declare
    v_user_id bigint;
begin
    select user_id into v_user_id from public.usage_records where request_id = p_item.request_id;
    if v_user_id is not null and v_user_id <> all (p_locked) then
        return 'busy';
    end if;
    update public.usage_records set generation_id = p_item.generation_id where request_id = p_item.request_id and status = 'pending';
    return case when found then 'noted' else 'settled' end;
end $$;
revoke all on function public.note_generation(public.settlement_item, bigint[]) from public, anon, authenticated;
grant execute on function public.note_generation(public.settlement_item, bigint[]) to service_role;

-- Stores generation ids of requests that are still running, so that any instance can finish them.
create function public.note_generations(p_items jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_locked bigint[] := public.lock_users(public.settlement_users(p_items));
    v_raw jsonb;
    v_outcome text;
    v_answers jsonb[] := '{}';
begin
    for v_raw in select i from jsonb_array_elements(p_items) as i loop
        begin
            v_outcome := public.note_generation(jsonb_populate_record(null::public.settlement_item, v_raw), v_locked);
        exception when others then
            v_outcome := 'failed';
        end;
        v_answers := v_answers || jsonb_build_object('outcome', v_outcome, 'request_id', v_raw -> 'request_id');
    end loop;
    return to_jsonb(v_answers);
end $$;
revoke all on function public.note_generations(jsonb) from public, anon, authenticated;
grant execute on function public.note_generations(jsonb) to service_role;

create function public.list_expired_holds(p_limit int, p_skip int default 0) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_holds jsonb;
begin
    with expired as (
        select r as record, r.expires_at from public.usage_records r
        where r.expires_at >= (select swept_until from public.gateway_state) and r.expires_at <= v_now and r.status = 'pending'
        order by r.expires_at limit p_limit offset p_skip
    ), moved as (
        update public.gateway_state set swept_until = m.until
        from (select least(min(expires_at), v_now - interval '1 minute') as until from expired) as m
        where singleton and swept_until < m.until and p_skip = 0
    )
    select coalesce(jsonb_agg(public.hold_json(record) order by expires_at), '[]') into v_holds from expired;
    return v_holds;
end $$;
revoke all on function public.list_expired_holds(int, int) from public, anon, authenticated;
grant execute on function public.list_expired_holds(int, int) to service_role;

-- An expiry that is moved to before the watermark takes the watermark along, or the sweep would never see it.
create function public.lower_watermark() returns trigger language plpgsql set search_path = '' as $$
begin
    update public.gateway_state set swept_until = least(swept_until, new.expires_at) where singleton and swept_until > new.expires_at;
    return null;
end $$;
revoke all on function public.lower_watermark() from public, anon, authenticated;
grant execute on function public.lower_watermark() to service_role;
create trigger usage_records_expiry_moved after update of expires_at on public.usage_records
    for each row execute function public.lower_watermark();


-- ============================================================================
-- accounting
-- ============================================================================

-- Accounting: registration, credits, limits and plans as an admin sets them, the mode of this database, and the proof that it adds up.

create function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261130100100::bigint
$$;
revoke all on function public.schema_version() from public, anon, authenticated;
grant execute on function public.schema_version() to service_role;

create function public.count_users() returns bigint language sql stable set search_path = '' as $$
    select count(*) from public.users where deleted_at is null
$$;
revoke all on function public.count_users() from public, anon, authenticated;
grant execute on function public.count_users() to service_role;

create function public.write_audit(
    p_actor text, p_action text, p_target text, p_user_id bigint, p_key_id bigint, p_address text, p_user_agent text, p_request_id uuid,
    p_details jsonb
) returns void language sql set search_path = '' as $$
    insert into public.audit_logs (actor, action, target, user_id, key_id, ip, user_agent, request_id, details)
    values (p_actor, p_action, p_target, p_user_id, p_key_id, p_address::inet, left(p_user_agent, 512), p_request_id,
            coalesce(p_details, '{}'))
$$;
revoke all on function public.write_audit(text, text, text, bigint, bigint, text, text, uuid, jsonb) from public, anon, authenticated;
grant execute on function public.write_audit(text, text, text, bigint, bigint, text, text, uuid, jsonb) to service_role;

-- Changes the credits of a user whose row is locked, with the ledger entry that explains it. An order that was carried out before
-- returns its first transaction.
create function public.change_credits(
    p_user_id bigint, p_kind text, p_amount_nanos bigint, p_actor text, p_reason text, p_idempotency_key text, p_payment_method text
) returns public.credit_transactions language plpgsql set search_path = '' as $$
declare
    v_entry public.credit_transactions;
    v_balance bigint;
begin
    select * into v_entry from public.credit_transactions where idempotency_key = p_idempotency_key;
    if found then
        return v_entry;
    end if;
    update public.users set credits_nanos = credits_nanos + p_amount_nanos, updated_at = clock_timestamp()
    where id = p_user_id returning credits_nanos into v_balance;
    insert into public.credit_transactions (user_id, kind, amount_nanos, balance_after_nanos, actor, reason, idempotency_key, payment_method)
    values (p_user_id, p_kind, p_amount_nanos, v_balance, p_actor, p_reason, p_idempotency_key, p_payment_method)
    returning * into v_entry;
    return v_entry;
end $$;
revoke all on function public.change_credits(bigint, text, bigint, text, text, text, text) from public, anon, authenticated;
grant execute on function public.change_credits(bigint, text, bigint, text, text, text, text) to service_role;

create function public.activate_subscription(p_user_id bigint, p_funded boolean) returns void
language sql set search_path = '' as $$
    update public.users set subscription_status = 'active', is_funded = is_funded or p_funded, updated_at = clock_timestamp()
    where id = p_user_id
$$;
revoke all on function public.activate_subscription(bigint, boolean) from public, anon, authenticated;
grant execute on function public.activate_subscription(bigint, boolean) to service_role;

-- An address may do this p_limit times an hour. True counts the attempt, false refuses it.
create function public.count_address(p_subject text, p_limit bigint) returns boolean
language plpgsql set search_path = '' as $$
declare
    v_id bigint := hashtextextended(p_subject, 0);
    v_bucket bigint := extract(epoch from clock_timestamp()) * 1000 / 300000;
    v_ring bigint[];
begin
    insert into public.rate_limit_usage (subject, subject_id) values ('address', v_id) on conflict do nothing;
    select public.advance_ring(hour_ring, 13, v_bucket) into v_ring from public.rate_limit_usage
    where subject = 'address' and subject_id = v_id for no key update;
    if v_ring[27] >= p_limit then
        return false;
    end if;
    update public.rate_limit_usage set hour_ring = public.count_in_ring(v_ring, 13, null, 1, 0), last_used_at = clock_timestamp()
    where subject = 'address' and subject_id = v_id;
    return true;
end $$;
revoke all on function public.count_address(text, bigint) from public, anon, authenticated;
grant execute on function public.count_address(text, bigint) to service_role;

-- p: as before, and email_hashes (under each secret, the current first). An address that has had signup credits gets none.
-- Outcomes: registered, address_limit, username_taken, email_taken, wrong_mode.
create function public.register_user(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users;
    v_key_id bigint;
    v_nanos bigint := (p ->> 'signup_nanos')::bigint;
    v_constraint text;
begin
    -- A switch to live mode waits for this one, or this one for it: play credits of a new account would outlive the switch.
    perform from public.gateway_state where singleton and mode = coalesce(p ->> 'mode', mode) for share;
    if not found then
        return jsonb_build_object('outcome', 'wrong_mode');
    end if;
    -- Counted whatever comes of it: who asks whether a name or an address is taken has tried.
    if p ->> 'address_subject' is not null and not public.count_address('register:' || (p ->> 'address_subject'), 5) then
        return jsonb_build_object('outcome', 'address_limit');
    end if;
    begin
        insert into public.users (username, email, auth_method, trial_expires_at)
        values (p ->> 'username', p ->> 'email', p ->> 'auth_method',
                clock_timestamp() + make_interval(days => (p ->> 'trial_days')::int))
        returning * into v_user;
    exception when unique_violation then
        get stacked diagnostics v_constraint = constraint_name;
        return jsonb_build_object('outcome', case v_constraint when 'users_email_key' then 'email_taken' else 'username_taken' end);
    end;
    insert into public.rate_limit_usage (subject, subject_id) values ('user', v_user.id);
    v_key_id := public.insert_key(v_user.id, p -> 'key', true);
    if v_nanos > 0 and not exists (
           select from public.signup_claims c where c.email_hash in (select jsonb_array_elements_text(p -> 'email_hashes'))) then
        perform public.change_credits(v_user.id, 'grant', v_nanos, 'gateway', 'signup credits', null, null);
        perform public.claim_signup(p);
    end if;
    perform public.write_audit(coalesce(p ->> 'actor', 'user:' || v_user.id), 'create', 'user:' || v_user.id, v_user.id, v_key_id,
                               p ->> 'address', p ->> 'user_agent', (p ->> 'request_id')::uuid, null);
    select * into v_user from public.users where id = v_user.id;
    return jsonb_build_object('outcome', 'registered', 'user_id', v_user.id, 'key_id', v_key_id, 'credits_nanos', v_user.credits_nanos,
                              'subscription_status', v_user.subscription_status, 'trial_expires_at', v_user.trial_expires_at);
end $$;

create function public.insert_key(p_user_id bigint, p_key jsonb, p_primary boolean) returns bigint
language plpgsql set search_path = '' as $$
declare
    v_id bigint;
begin
    insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, environment_tag, scope_permissions,
                                     is_primary)
    values (p_user_id, p_key ->> 'key_name', p_key ->> 'key_prefix', p_key ->> 'last4', p_key ->> 'key_hash', p_key ->> 'hash_secret_id',
            p_key ->> 'environment_tag', p_key -> 'scope_permissions', p_primary)
    returning id into v_id;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_id, null, null, null, null);
    return v_id;
end $$;
revoke all on function public.insert_key(bigint, jsonb, boolean) from public, anon, authenticated;
grant execute on function public.insert_key(bigint, jsonb, boolean) to service_role;
revoke all on function public.register_user(jsonb) from public, anon, authenticated;
grant execute on function public.register_user(jsonb) to service_role;

-- The user an admin means: by id, or by one of their keys. Locked, so that what follows is decided on what it reads.
create function public.lock_target(p jsonb) returns public.users
language plpgsql set search_path = '' as $$
declare
    v_id bigint := (p ->> 'user_id')::bigint;
    v_user public.users;
begin
    if v_id is null then
        select k.user_id into v_id from public.api_keys_new k where k.id = public.target_key(p);
    end if;
    select * into v_user from public.users where id = v_id and deleted_at is null for no key update;
    return v_user;
end $$;

create function public.target_key(p jsonb) returns bigint language sql stable set search_path = '' as $$
    select coalesce((select k.id from public.api_keys_new k where k.id = (p ->> 'key_id')::bigint),
                    public.find_key(array(select jsonb_array_elements_text(p -> 'hashes'))))
$$;
revoke all on function public.target_key(jsonb) from public, anon, authenticated;
grant execute on function public.target_key(jsonb) to service_role;
revoke all on function public.lock_target(jsonb) from public, anon, authenticated;
grant execute on function public.lock_target(jsonb) to service_role;

-- p: user_id or hashes, amount_nanos, reason, idempotency_key, actor, address, user_agent, request_id.
-- Outcomes: granted, repeated, not_found, conflict (the idempotency key belongs to another order), too_large.
create function public.grant_credits(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_amount bigint := (p ->> 'amount_nanos')::bigint;
    v_entry public.credit_transactions;
    v_before bigint := (select coalesce(max(t.id), 0) from public.credit_transactions t);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    elsif v_user.credits_nanos > 9000000000000000000 - v_amount then
        return jsonb_build_object('outcome', 'too_large');
    end if;
    begin
        v_entry := public.change_credits(v_user.id, 'grant', v_amount, p ->> 'actor', coalesce(p ->> 'reason', ''), p ->> 'idempotency_key', null);
    exception when unique_violation then -- the same key, at the same time, for another user
        return jsonb_build_object('outcome', 'conflict');
    end;
    if (v_entry.user_id, v_entry.kind, v_entry.amount_nanos) is distinct from (v_user.id, 'grant'::text, v_amount) then
        return jsonb_build_object('outcome', 'conflict');
    end if;
    if v_entry.id <= v_before then
        return jsonb_build_object('outcome', 'repeated', 'user_id', v_user.id, 'transaction_id', v_entry.id,
                                  'balance_nanos', v_user.credits_nanos);
    end if;
    perform public.activate_subscription(v_user.id, true);
    perform public.write_audit(p ->> 'actor', 'add_credits', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, jsonb_build_object('amount_nanos', v_amount, 'transaction_id', v_entry.id));
    return jsonb_build_object('outcome', 'granted', 'user_id', v_user.id, 'transaction_id', v_entry.id,
                              'balance_nanos', v_entry.balance_after_nanos);
end $$;
revoke all on function public.grant_credits(jsonb) from public, anon, authenticated;
grant execute on function public.grant_credits(jsonb) to service_role;

-- p: user_id, or hashes / key_id for one key (subject: user | key), limits {...}, actor, ... Outcomes: set, not_found.
create function public.set_rate_limits(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_key bigint := case when p ->> 'subject' = 'key' then public.target_key(p) end;
    v_limits public.rate_limit_configs;
begin
    if v_user.id is null or (p ->> 'subject' = 'key' and not exists (
           select from public.api_keys_new k where k.id = v_key and k.user_id = v_user.id)) then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    select * into v_limits from public.rate_limit_configs
    where (subject, subject_id) in ((p ->> 'subject', coalesce(v_key, v_user.id)), ('default', 0))
    order by (subject = 'default') limit 1;
    if v_key is not null and v_limits.subject = 'default' then
        v_limits := null;
    end if;
    v_limits := jsonb_populate_record(v_limits, p -> 'limits');
    v_limits.subject := p ->> 'subject';
    v_limits.subject_id := coalesce(v_key, v_user.id);
    v_limits.updated_at := clock_timestamp();
    delete from public.rate_limit_configs where subject = v_limits.subject and subject_id = v_limits.subject_id;
    insert into public.rate_limit_configs select v_limits.*;
    perform public.write_audit(p ->> 'actor', 'set_limits', v_limits.subject || ':' || v_limits.subject_id, v_user.id, v_key,
                               p ->> 'address', p ->> 'user_agent', (p ->> 'request_id')::uuid, p -> 'limits');
    return jsonb_build_object('outcome', 'set', 'user_id', v_user.id, 'key_id', v_key, 'limits', to_jsonb(v_limits));
end $$;
revoke all on function public.set_rate_limits(jsonb) from public, anon, authenticated;
grant execute on function public.set_rate_limits(jsonb) to service_role;

create function public.assign_plan(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p); -- before the clock is read, so that a plan never begins before the one it replaces
begin
    return public.assign_plan_at(p, clock_timestamp());
end $$;
revoke all on function public.assign_plan(jsonb) from public, anon, authenticated;
grant execute on function public.assign_plan(jsonb) to service_role;

-- Which HMAC secrets the stored keys still need: ids, so that start-up can refuse to drop one.
create function public.key_secrets_in_use() returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(distinct s), '[]') from (
        select hash_secret_id as s from public.api_keys_new where revoked_at is null
        union select previous_hash_secret_id from public.api_keys_new where previous_valid_until > now()
    ) as used where s is not null
$$;
revoke all on function public.key_secrets_in_use() from public, anon, authenticated;
grant execute on function public.key_secrets_in_use() to service_role;

-- The database takes this mode, or refuses: a live database never serves invented answers again. The first live start ends play money.
create function public.enter_mode(p_mode text) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_mode text;
begin
    if p_mode is null or p_mode not in ('sandbox', 'live') then
        raise exception 'there is no mode %', p_mode using errcode = 'invalid_parameter_value';
    end if;
    select mode into v_mode from public.gateway_state where singleton for update;
    if v_mode = p_mode then
        return jsonb_build_object('outcome', 'entered', 'mode', v_mode);
    elsif v_mode = 'live' then
        return jsonb_build_object('outcome', 'refused', 'mode', v_mode);
    end if;
    update public.gateway_state set mode = 'live', mode_since = clock_timestamp() where singleton;
    with locked as (
        select id, credits_nanos - held_nanos as unheld from public.users order by id for no key update
    ), emptied as (
        update public.users u set credits_nanos = u.credits_nanos - l.unheld, is_funded = false
        from locked l where l.id = u.id and (l.unheld > 0 or u.is_funded)
        returning u.id, u.credits_nanos as left_nanos, l.unheld
    )
    insert into public.credit_transactions (user_id, kind, amount_nanos, balance_after_nanos, actor, reason)
    select e.id, 'expiry', -e.unheld, e.left_nanos, 'gateway', 'play credits end when the gateway goes live'
    from emptied e where e.unheld > 0 order by e.id;
    return jsonb_build_object('outcome', 'entered', 'mode', 'live');
end $$;
revoke all on function public.enter_mode(text) from public, anon, authenticated;
grant execute on function public.enter_mode(text) to service_role;

-- Promise 2 as a query: every account whose books do not add up. No row, ever.
create function public.audit_ledger() returns table (user_id bigint, credits_nanos bigint, ledger_nanos numeric, held_nanos bigint, pending_nanos numeric)
language sql stable set search_path = '' as $$
    select u.id, u.credits_nanos, coalesce(t.total, 0) - coalesce(r.charged, 0), u.held_nanos, coalesce(r.pending, 0)
    from public.users u
    left join (select t.user_id, sum(t.amount_nanos) as total from public.credit_transactions t group by 1) t on t.user_id = u.id
    left join (select r.user_id, sum(r.cost_nanos) as charged, sum(r.hold_nanos) filter (where r.status = 'pending') as pending
               from public.usage_records r group by 1) r on r.user_id = u.id
    where u.credits_nanos <> coalesce(t.total, 0) - coalesce(r.charged, 0) or u.held_nanos <> coalesce(r.pending, 0)
$$;
revoke all on function public.audit_ledger() from public, anon, authenticated;
grant execute on function public.audit_ledger() to service_role;


-- ============================================================================
-- keys
-- ============================================================================

-- Keys: making, changing, rotating and revoking them; never broader than the key that does it.
-- Functions take p jsonb and return an outcome. The stamp of an action (actor, address, user_agent, request_id) is in p.

create function public.scopes_within(p_inner jsonb, p_outer jsonb) returns boolean
language sql immutable set search_path = '' as $$
    select not exists (
        select from jsonb_each(p_inner) as verb (name, resources), jsonb_array_elements_text(verb.resources) as resource (name)
        where not coalesce((p_outer -> verb.name) ?| array['*', resource.name], false)
    )
$$;
comment on function public.scopes_within is 'Whether everything that the inner scopes allow is allowed by the outer ones.';
revoke all on function public.scopes_within(jsonb, jsonb) from public, anon, authenticated;
grant execute on function public.scopes_within(jsonb, jsonb) to service_role;

create function public.environment_rank(p_environment text) returns int language sql immutable set search_path = '' as $$
    select case p_environment when 'test' then 1 when 'live' then 3 else 2 end
$$;
revoke all on function public.environment_rank(text) from public, anon, authenticated;
grant execute on function public.environment_rank(text) to service_role;

-- Why a key may not exist at the hands of its maker (the key that asks for it), or null. An administrator's hands have no key.
create function public.broader_than(p_key public.api_keys_new, p_maker public.api_keys_new) returns text
language plpgsql stable set search_path = '' as $$
begin
    if p_maker.id is null then
        return null;
    elsif not public.scopes_within(p_key.scope_permissions, p_maker.scope_permissions) then
        return 'scope_permissions';
    elsif public.environment_rank(p_key.environment_tag) > public.environment_rank(p_maker.environment_tag) then
        return 'environment_tag';
    elsif p_maker.expiration_date is not null and coalesce(p_key.expiration_date, 'infinity') > p_maker.expiration_date then
        return 'expiration_date';
    elsif p_maker.allowed_models is not null
          and (p_key.allowed_models is null or not public.models_allowed(p_maker.allowed_models, p_key.allowed_models)) then
        return 'allowed_models';
    elsif cardinality(p_maker.ip_allowlist) > 0 and (cardinality(p_key.ip_allowlist) = 0 or exists (
            select from unnest(p_key.ip_allowlist) as n where not n <<= any (p_maker.ip_allowlist))) then
        return 'ip_allowlist';
    elsif cardinality(p_maker.domain_referrers) > 0 and (cardinality(p_key.domain_referrers) = 0 or exists (
            select from unnest(p_key.domain_referrers) as d
            where not (d = any (p_maker.domain_referrers)
                       or public.domain_allowed(case when d like '*.%' then array(select m from unnest(p_maker.domain_referrers) m where m like '*.%')
                                                     else p_maker.domain_referrers end, ltrim(d, '*.'))))) then
        return 'domain_referrers';
    elsif p_maker.max_requests is not null and (p_key.id is distinct from p_maker.id or coalesce(p_key.max_requests, 'infinity'::numeric) > p_maker.max_requests) then
        return 'max_requests';
    elsif p_maker.budget_nanos is not null and (p_key.id is distinct from p_maker.id or p_key.budget_nanos is null
          or p_key.budget_nanos > p_maker.budget_nanos or p_key.budget_window <> p_maker.budget_window) then
        return 'budget';
    end if;
    return null;
end $$;
comment on function public.broader_than is
    'A restricted key makes only keys with the same restrictions; one that counts requests or money makes none, as each key counts anew.';
revoke all on function public.broader_than(public.api_keys_new, public.api_keys_new) from public, anon, authenticated;
grant execute on function public.broader_than(public.api_keys_new, public.api_keys_new) to service_role;

create function public.key_view(p_key public.api_keys_new) returns jsonb language sql stable set search_path = '' as $$
    select (to_jsonb(p_key) - 'key_hash' - 'hash_secret_id' - 'encrypted_key' - 'previous_key_hash' - 'previous_hash_secret_id')
           || jsonb_build_object('is_revealable', p_key.encrypted_key is not null, 'requests_used', coalesce(u.requests_used, 0),
                                 'last_used_at', u.last_used_at, 'budget_since', nullif(u.budget_since, '-infinity'),
                                 'budget_spent_nanos', case when u.budget_since < public.budget_start(p_key.budget_window, now()) then 0
                                                            else coalesce(u.budget_spent_nanos, 0) end)
    from (select) as one left join public.rate_limit_usage u on u.subject = 'key' and u.subject_id = p_key.id
$$;
revoke all on function public.key_view(public.api_keys_new) from public, anon, authenticated;
grant execute on function public.key_view(public.api_keys_new) to service_role;

create function public.list_keys(p_user_id bigint) returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(public.key_view(k) order by k.id), '[]') from public.api_keys_new k
    where k.user_id = p_user_id and k.revoked_at is null
$$;
revoke all on function public.list_keys(bigint) from public, anon, authenticated;
grant execute on function public.list_keys(bigint) to service_role;

create function public.audit_key(p jsonb, p_action text, p_key public.api_keys_new, p_details jsonb) returns void
language sql set search_path = '' as $$
    select public.write_audit(p ->> 'actor', p_action, 'key:' || p_key.id, p_key.user_id, p_key.id, p ->> 'address', p ->> 'user_agent',
                              (p ->> 'request_id')::uuid, p_details)
$$;
revoke all on function public.audit_key(jsonb, text, public.api_keys_new, jsonb) from public, anon, authenticated;
grant execute on function public.audit_key(jsonb, text, public.api_keys_new, jsonb) to service_role;

-- The key that acts, after its user's row is locked: it may have been revoked since it was verified.
create function public.acting_key(p jsonb) returns public.api_keys_new language sql stable set search_path = '' as $$
    select k from public.api_keys_new k where k.id = (p ->> 'maker_id')::bigint and k.is_active and k.revoked_at is null
$$;
revoke all on function public.acting_key(jsonb) from public, anon, authenticated;
grant execute on function public.acting_key(jsonb) to service_role;

-- p: user_id, maker_id, key {...}. Outcomes: those of add_key, broader, not_found.
create function public.create_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_why text;
begin
    if v_user.id is null or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_why := public.broader_than(jsonb_populate_record(null::public.api_keys_new, p -> 'key'), v_maker);
    if v_why is null and exists (select from public.rate_limit_configs c where c.subject = 'key' and c.subject_id = v_maker.id) then
        v_why := 'rate_limits';
    end if;
    if v_why is not null then
        return jsonb_build_object('outcome', 'broader', 'field', v_why);
    end if;
    return public.add_key(p, v_user.id);
end $$;
revoke all on function public.create_key(jsonb) from public, anon, authenticated;
grant execute on function public.create_key(jsonb) to service_role;

-- p: user_id, maker_id, key_id, changes {...}. Outcomes: updated, name_taken, broader, too_many, not_found.
create function public.update_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
    v_why text;
begin
    select * into v_key from public.api_keys_new k
    where k.id = (p ->> 'key_id')::bigint and k.user_id = v_user.id and k.revoked_at is null for update;
    if not found or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_key := jsonb_populate_record(v_key, p -> 'changes');
    v_why := public.broader_than(v_key, v_maker);
    if v_why is not null then
        return jsonb_build_object('outcome', 'broader', 'field', v_why);
    elsif exists (select from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null
                  and k.key_name = v_key.key_name and k.id <> v_key.id) then
        return jsonb_build_object('outcome', 'name_taken');
    elsif v_key.is_active and (select count(*) from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null
                               and k.is_active and k.id <> v_key.id) >= 50 then
        return jsonb_build_object('outcome', 'too_many');
    end if;
    update public.api_keys_new k set
        key_name = v_key.key_name, scope_permissions = v_key.scope_permissions, ip_allowlist = v_key.ip_allowlist,
        domain_referrers = v_key.domain_referrers, allowed_models = v_key.allowed_models, expiration_date = v_key.expiration_date,
        max_requests = v_key.max_requests, budget_nanos = v_key.budget_nanos, budget_window = v_key.budget_window,
        cache_ttl_seconds = v_key.cache_ttl_seconds, is_active = v_key.is_active, updated_at = clock_timestamp()
    where k.id = v_key.id returning * into v_key;
    perform public.audit_key(p, 'update', v_key, jsonb_build_object('fields', (select jsonb_agg(f) from jsonb_object_keys(p -> 'changes') f)));
    return jsonb_build_object('outcome', 'updated', 'key', public.key_view(v_key));
end $$;
revoke all on function public.update_key(jsonb) from public, anon, authenticated;
grant execute on function public.update_key(jsonb) to service_role;

-- p: user_id, maker_id, grace_seconds, keys [{key_id, key_hash, hash_secret_id, last4, encrypted_key}]: all of them or none.
-- Outcomes: rotated, broader, not_found.
create function public.rotate_keys(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_new record;
    v_key public.api_keys_new;
    v_until timestamptz := clock_timestamp() + make_interval(secs => (p ->> 'grace_seconds')::int);
    v_views jsonb := '[]';
begin
    for v_new in select n.* from jsonb_to_recordset(p -> 'keys')
                 as n (key_id bigint, key_hash text, hash_secret_id text, last4 text, encrypted_key text) loop
        select * into v_key from public.api_keys_new k where k.id = v_new.key_id and k.user_id = v_user.id and k.revoked_at is null;
        if not found or v_maker.id is null then
            return jsonb_build_object('outcome', 'not_found', 'key_id', v_new.key_id);
        elsif public.broader_than(v_key, v_maker) is not null then
            return jsonb_build_object('outcome', 'broader', 'field', public.broader_than(v_key, v_maker), 'key_id', v_key.id);
        end if;
    end loop;
    for v_new in select n.* from jsonb_to_recordset(p -> 'keys')
                 as n (key_id bigint, key_hash text, hash_secret_id text, last4 text, encrypted_key text) loop
        update public.api_keys_new k set
            previous_key_hash = k.key_hash, previous_hash_secret_id = k.hash_secret_id, previous_valid_until = v_until,
            key_hash = v_new.key_hash, hash_secret_id = v_new.hash_secret_id, last4 = v_new.last4,
            encrypted_key = case when k.encrypted_key is not null then v_new.encrypted_key end, updated_at = clock_timestamp()
        where k.id = v_new.key_id returning * into v_key;
        perform public.audit_key(p, 'rotate', v_key, jsonb_build_object('grace_seconds', (p ->> 'grace_seconds')::int));
        v_views := v_views || public.key_view(v_key);
    end loop;
    return jsonb_build_object('outcome', 'rotated', 'keys', v_views);
end $$;
revoke all on function public.rotate_keys(jsonb) from public, anon, authenticated;
grant execute on function public.rotate_keys(jsonb) to service_role;

-- p: user_id (null: anybody's, for an administrator), maker_id (null: an administrator), key_id. A key of a lesser environment ends none of
-- a higher one, as it changes and rotates none. Outcomes: revoked, broader, not_found.
create function public.revoke_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p || jsonb_build_object('user_id', coalesce((p ->> 'user_id')::bigint, (
        select k.user_id from public.api_keys_new k where k.id = (p ->> 'key_id')::bigint))));
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
begin
    select * into v_key from public.api_keys_new k
    where k.id = (p ->> 'key_id')::bigint and k.user_id = v_user.id and k.revoked_at is null;
    if not found or (p ->> 'maker_id' is not null and v_maker.id is null) then
        return jsonb_build_object('outcome', 'not_found');
    elsif public.environment_rank(v_key.environment_tag) > public.environment_rank(v_maker.environment_tag) and v_maker.id is not null then
        return jsonb_build_object('outcome', 'broader', 'field', 'environment_tag');
    end if;
    update public.api_keys_new k set is_active = false, is_primary = false, revoked_at = clock_timestamp(), updated_at = clock_timestamp(),
        encrypted_key = null, previous_key_hash = null, previous_hash_secret_id = null, previous_valid_until = null
    where k.id = v_key.id returning * into v_key;
    perform public.audit_key(p, 'delete', v_key, jsonb_build_object('key_name', v_key.key_name));
    return jsonb_build_object('outcome', 'revoked', 'user_id', v_key.user_id, 'key_id', v_key.id);
end $$;
revoke all on function public.revoke_key(jsonb) from public, anon, authenticated;
grant execute on function public.revoke_key(jsonb) to service_role;

-- p: user_id, maker_id, key_id. Outcomes: revealed (with the token), not_revealable, broader, not_found. Every look is audited.
create function public.reveal_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
begin
    select * into v_key from public.api_keys_new k where k.id = (p ->> 'key_id')::bigint and k.user_id = v_user.id and k.revoked_at is null;
    if not found or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    elsif v_key.encrypted_key is null then
        return jsonb_build_object('outcome', 'not_revealable');
    elsif public.broader_than(v_key, v_maker) is not null then
        return jsonb_build_object('outcome', 'broader', 'field', public.broader_than(v_key, v_maker));
    end if;
    perform public.audit_key(p, 'reveal', v_key, null);
    return jsonb_build_object('outcome', 'revealed', 'encrypted_key', v_key.encrypted_key, 'key', public.key_view(v_key));
end $$;
revoke all on function public.reveal_key(jsonb) from public, anon, authenticated;
grant execute on function public.reveal_key(jsonb) to service_role;

-- p: keys [{user_id, key_sha256, key_name, key_prefix, last4, environment_tag, ...}]. Known ones are left as they are.
-- Outcomes: imported, not_found (with the user_id that does not exist: nothing is imported).
create function public.import_keys(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_missing bigint;
    v_count int;
begin
    select (i ->> 'user_id')::bigint into v_missing from jsonb_array_elements(p -> 'keys') as i
    where not exists (select from public.users u where u.id = (i ->> 'user_id')::bigint and u.deleted_at is null) limit 1;
    if found then
        return jsonb_build_object('outcome', 'not_found', 'user_id', v_missing);
    end if;
    perform public.lock_users(array(select (i ->> 'user_id')::bigint from jsonb_array_elements(p -> 'keys') as i));
    insert into public.api_keys (user_id, key_sha256, key_name, key_prefix, last4, environment_tag, scope_permissions, expiration_date,
                                 max_requests, is_active)
    select k.user_id, k.key_sha256, k.key_name, k.key_prefix, k.last4, k.environment_tag, k.scope_permissions, k.expiration_date,
           k.max_requests, k.is_active
    from jsonb_populate_recordset(null::public.api_keys, p -> 'keys') as k
    on conflict (key_sha256) do nothing;
    get diagnostics v_count = row_count;
    perform public.write_audit(p ->> 'actor', 'import_keys', null, null, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, jsonb_build_object('imported', v_count));
    return jsonb_build_object('outcome', 'imported', 'imported', v_count, 'known', jsonb_array_length(p -> 'keys') - v_count);
end $$;
revoke all on function public.import_keys(jsonb) from public, anon, authenticated;
grant execute on function public.import_keys(jsonb) to service_role;

-- Keys by what is shown of them (prefix and last 4), name or user, for an administrator.
create function public.find_keys(p_text text, p_user_id bigint, p_before bigint, p_limit int) returns jsonb
language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(public.key_view(k) order by k.id desc), '[]') from (
        select * from public.api_keys_new k
        where (p_user_id is null or k.user_id = p_user_id) and (p_before is null or k.id < p_before)
          and (p_text is null or k.last4 = right(p_text, 4) and starts_with(p_text, k.key_prefix) or strpos(lower(k.key_name), lower(p_text)) > 0
               or starts_with(k.key_prefix, p_text))
        order by k.id desc limit p_limit) as k
$$;
revoke all on function public.find_keys(text, bigint, bigint, int) from public, anon, authenticated;
grant execute on function public.find_keys(text, bigint, bigint, int) to service_role;


-- ============================================================================
-- management
-- ============================================================================

-- Management: profiles, deletion, suspension, roles, plans, refunds and adjustments. p jsonb in, outcome out, as with keys.

-- p: user_id, changes {username, email, preferences, settings}. Outcomes: updated, username_taken, email_taken, not_found.
create function public.update_profile(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_constraint text;
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_user := jsonb_populate_record(v_user, p -> 'changes');
    if octet_length(v_user.preferences::text) > 16384 or octet_length(v_user.settings::text) > 16384 then
        return jsonb_build_object('outcome', 'too_large'); -- the row is read and written by every request of this user
    end if;
    begin
        update public.users set username = v_user.username, email = v_user.email, preferences = v_user.preferences,
            settings = v_user.settings, updated_at = clock_timestamp()
        where id = v_user.id;
    exception when unique_violation then
        get stacked diagnostics v_constraint = constraint_name;
        return jsonb_build_object('outcome', case v_constraint when 'users_email_key' then 'email_taken' else 'username_taken' end);
    end;
    perform public.write_audit(p ->> 'actor', 'update_profile', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
        (p ->> 'request_id')::uuid, jsonb_build_object('fields', (select jsonb_agg(f) from jsonb_object_keys(p -> 'changes') f)));
    return jsonb_build_object('outcome', 'updated');
end $$;
revoke all on function public.update_profile(jsonb) from public, anon, authenticated;
grant execute on function public.update_profile(jsonb) to service_role;

create function public.expire_unheld(p_user_id bigint, p_reason text) returns void language plpgsql set search_path = '' as $$
declare
    v_unheld bigint;
begin
    select credits_nanos - held_nanos into v_unheld from public.users where id = p_user_id;
    if v_unheld > 0 then
        perform public.change_credits(p_user_id, 'expiry', -v_unheld, 'gateway', p_reason, null, null);
    end if;
end $$;
revoke all on function public.expire_unheld(bigint, text) from public, anon, authenticated;
grant execute on function public.expire_unheld(bigint, text) to service_role;

-- p: user_id, email_hashes (of the account's address: accounts older than signup_claims claim theirs as they go).
-- Outcomes: deleted, not_found.
create function public.delete_account(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    if exists (select from public.credit_transactions t where t.user_id = v_user.id and t.reason = 'signup credits') then
        perform public.claim_signup(p);
    end if;
    update public.api_keys_new set is_active = false, is_primary = false, revoked_at = clock_timestamp(), encrypted_key = null,
        previous_key_hash = null, previous_hash_secret_id = null, previous_valid_until = null
    where user_id = v_user.id and revoked_at is null;
    update public.api_keys set is_active = false where user_id = v_user.id;
    update public.user_plans set is_active = false where user_id = v_user.id and is_active;
    perform public.expire_unheld(v_user.id, 'account deleted');
    update public.users set username = 'deleted-' || v_user.id, email = 'deleted-' || v_user.id, preferences = '{}', settings = '{}',
        is_active = false, deleted_at = clock_timestamp(), updated_at = clock_timestamp()
    where id = v_user.id;
    perform public.write_audit(p ->> 'actor', 'delete', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, null);
    return jsonb_build_object('outcome', 'deleted', 'user_id', v_user.id);
end $$;
revoke all on function public.delete_account(jsonb) from public, anon, authenticated;
grant execute on function public.delete_account(jsonb) to service_role;

-- What running requests still held of a deleted account leaves as they are settled.
create function public.expire_rest_of_deleted() returns trigger language plpgsql set search_path = '' as $$
begin
    perform public.expire_unheld(new.id, 'account deleted');
    return null;
end $$;
revoke all on function public.expire_rest_of_deleted() from public, anon, authenticated;
grant execute on function public.expire_rest_of_deleted() to service_role;
create trigger users_deleted_keep_nothing after update of held_nanos on public.users
    for each row when (new.deleted_at is not null and new.credits_nanos > new.held_nanos)
    execute function public.expire_rest_of_deleted();

-- p: user_id, changes {is_active, role}. Outcomes: set, not_found.
create function public.set_user(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_user := jsonb_populate_record(v_user, p -> 'changes');
    update public.users set is_active = v_user.is_active, role = v_user.role, updated_at = clock_timestamp() where id = v_user.id;
    perform public.write_audit(p ->> 'actor', 'set_user', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, p -> 'changes');
    return jsonb_build_object('outcome', 'set', 'user_id', v_user.id);
end $$;
revoke all on function public.set_user(jsonb) from public, anon, authenticated;
grant execute on function public.set_user(jsonb) to service_role;

-- p: user_id. Outcomes: cancelled, no_plan.
create function public.cancel_plan(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_plan public.user_plans;
    v_now timestamptz := clock_timestamp();
begin
    update public.user_plans set is_active = false, end_date = greatest(least(end_date, v_now), start_date + interval '1 microsecond')
    where user_id = v_user.id and is_active and v_now < end_date returning * into v_plan;
    if not found then
        return jsonb_build_object('outcome', 'no_plan');
    end if;
    update public.users set subscription_status = 'cancelled', updated_at = v_now where id = v_user.id;
    perform public.write_audit(p ->> 'actor', 'cancel_plan', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, jsonb_build_object('plan_id', v_plan.plan_id));
    return jsonb_build_object('outcome', 'cancelled', 'plan_id', v_plan.plan_id);
end $$;
revoke all on function public.cancel_plan(jsonb) from public, anon, authenticated;
grant execute on function public.cancel_plan(jsonb) to service_role;

-- What a user may and does use: plan (if any), the limits that apply, counters of today and this month, rate limits and their rings.
create function public.read_limits(p_user_id bigint, p_key_id bigint) returns jsonb language plpgsql stable set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_user public.users;
    v_usage public.rate_limit_usage;
    v_limits public.rate_limit_configs;
begin
    select * into v_user from public.users where id = p_user_id;
    select * into v_usage from public.rate_limit_usage where subject = 'user' and subject_id = p_user_id;
    v_usage := public.advance_usage(v_usage, v_now, null);
    select * into v_limits from public.rate_limit_configs
    where (subject, subject_id) in (('user', p_user_id), ('default', 0)) order by (subject = 'default') limit 1;
    return jsonb_build_object(
        'now', v_now, 'limits', to_jsonb(v_limits),
        'key_limits', (select to_jsonb(c) from public.rate_limit_configs c where c.subject = 'key' and c.subject_id = p_key_id),
        'used', jsonb_build_object(
            'requests_per_minute', v_usage.minute_ring[15], 'tokens_per_minute', v_usage.minute_ring[16],
            'requests_per_hour', v_usage.hour_ring[27], 'tokens_per_hour', v_usage.hour_ring[28],
            'requests_per_day', v_usage.day_ring[51], 'tokens_per_day', v_usage.day_ring[52], 'running', v_usage.slots),
        'plan', to_jsonb(public.current_plan(v_user, v_now)),
        'assigned', (select to_jsonb(up) from public.user_plans up where up.user_id = p_user_id and up.is_active
                     and up.start_date <= v_now and v_now < up.end_date),
        'plan_used', jsonb_build_object('daily_requests', v_usage.plan_day_requests, 'daily_tokens', v_usage.plan_day_tokens,
                                        'monthly_requests', v_usage.plan_month_requests, 'monthly_tokens', v_usage.plan_month_tokens));
end $$;
revoke all on function public.read_limits(bigint, bigint) from public, anon, authenticated;
grant execute on function public.read_limits(bigint, bigint) to service_role;

-- p: plan {...}. Outcomes: created, slug_taken.
create function public.create_plan(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_plan public.plans := jsonb_populate_record(null::public.plans, p -> 'plan');
begin
    insert into public.plans (slug, name, description, price_per_month_nanos, daily_request_limit, monthly_request_limit, daily_token_limit,
                              monthly_token_limit, concurrency, features, allowed_models, environment_factors)
    values (v_plan.slug, v_plan.name, v_plan.description, v_plan.price_per_month_nanos, v_plan.daily_request_limit,
            v_plan.monthly_request_limit, v_plan.daily_token_limit, v_plan.monthly_token_limit, v_plan.concurrency, v_plan.features,
            v_plan.allowed_models, v_plan.environment_factors)
    on conflict (slug) do nothing returning * into v_plan;
    if not found then
        return jsonb_build_object('outcome', 'slug_taken');
    end if;
    perform public.write_audit(p ->> 'actor', 'create_plan', 'plan:' || v_plan.id, null, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, p -> 'plan');
    return jsonb_build_object('outcome', 'created', 'plan', to_jsonb(v_plan));
end $$;
revoke all on function public.create_plan(jsonb) from public, anon, authenticated;
grant execute on function public.create_plan(jsonb) to service_role;

-- p: plan_id, changes {...}; is_active false takes a plan off the list, those who have it keep it. Outcomes: updated, not_found, built_in.
create function public.update_plan(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_plan public.plans;
begin
    select * into v_plan from public.plans where id = (p ->> 'plan_id')::bigint for update;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_plan := jsonb_populate_record(v_plan, p -> 'changes');
    if not v_plan.is_active and v_plan.slug in ('free', 'pay-as-you-go') then
        return jsonb_build_object('outcome', 'built_in');
    end if;
    update public.plans set name = v_plan.name, description = v_plan.description, price_per_month_nanos = v_plan.price_per_month_nanos,
        daily_request_limit = v_plan.daily_request_limit, monthly_request_limit = v_plan.monthly_request_limit,
        daily_token_limit = v_plan.daily_token_limit, monthly_token_limit = v_plan.monthly_token_limit, concurrency = v_plan.concurrency,
        features = v_plan.features, allowed_models = v_plan.allowed_models, environment_factors = v_plan.environment_factors,
        is_active = v_plan.is_active, updated_at = clock_timestamp()
    where id = v_plan.id returning * into v_plan;
    perform public.write_audit(p ->> 'actor', 'update_plan', 'plan:' || v_plan.id, null, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, p -> 'changes');
    return jsonb_build_object('outcome', 'updated', 'plan', to_jsonb(v_plan));
end $$;
revoke all on function public.update_plan(jsonb) from public, anon, authenticated;
grant execute on function public.update_plan(jsonb) to service_role;

-- p: request_id_refunded, amount_nanos (null: all of it), reason, idempotency_key. A request is refunded at most its cost.
-- Outcomes: refunded, repeated, conflict, not_found, not_settled, too_much.
create function public.refund_request(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_record public.usage_records;
    v_refunded bigint;
    v_amount bigint;
    v_balance bigint;
    v_entry public.credit_transactions;
begin
    select * into v_record from public.usage_records where request_id = (p ->> 'refunded_request_id')::uuid;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform from public.users where id = v_record.user_id for no key update;
    select * into v_record from public.usage_records where request_id = v_record.request_id;
    select * into v_entry from public.credit_transactions where idempotency_key = p ->> 'idempotency_key';
    if found then
        return jsonb_build_object('outcome', case when v_entry.request_id = v_record.request_id
                                                       and v_entry.amount_nanos = coalesce((p ->> 'amount_nanos')::bigint, v_entry.amount_nanos)
                                                  then 'repeated' else 'conflict' end,
                                  'transaction_id', v_entry.id, 'user_id', v_entry.user_id, 'amount_nanos', v_entry.amount_nanos,
                                  'balance_nanos', (select credits_nanos from public.users where id = v_entry.user_id));
    elsif v_record.status = 'pending' then
        return jsonb_build_object('outcome', 'not_settled');
    elsif not exists (select from public.gateway_state s where s.mode = v_record.mode) then
        return jsonb_build_object('outcome', 'too_much', 'refundable_nanos', 0); -- play money is never given back as real
    end if;
    select coalesce(sum(amount_nanos), 0) into v_refunded from public.credit_transactions where request_id = v_record.request_id;
    v_amount := coalesce((p ->> 'amount_nanos')::bigint, v_record.cost_nanos - v_refunded);
    if v_amount <= 0 or v_amount > v_record.cost_nanos - v_refunded then
        return jsonb_build_object('outcome', 'too_much', 'refundable_nanos', v_record.cost_nanos - v_refunded);
    end if;
    update public.users set credits_nanos = credits_nanos + v_amount where id = v_record.user_id returning credits_nanos into v_balance;
    insert into public.credit_transactions (user_id, kind, amount_nanos, balance_after_nanos, request_id, actor, reason, idempotency_key)
    values (v_record.user_id, 'refund', v_amount, v_balance, v_record.request_id, p ->> 'actor', coalesce(p ->> 'reason', ''), p ->> 'idempotency_key')
    returning * into v_entry;
    perform public.write_audit(p ->> 'actor', 'refund', 'request:' || v_record.request_id, v_record.user_id, v_record.key_id, p ->> 'address',
                               p ->> 'user_agent', (p ->> 'request_id')::uuid, jsonb_build_object('amount_nanos', v_amount));
    return jsonb_build_object('outcome', 'refunded', 'transaction_id', v_entry.id, 'user_id', v_record.user_id, 'amount_nanos', v_amount,
                              'balance_nanos', v_balance);
end $$;
revoke all on function public.refund_request(jsonb) from public, anon, authenticated;
grant execute on function public.refund_request(jsonb) to service_role;

-- p: user_id or hashes, amount_nanos (signed), reason, idempotency_key. What is held cannot be taken.
-- Outcomes: adjusted, repeated, conflict, not_found, too_much, too_large.
create function public.adjust_credits(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_amount bigint := (p ->> 'amount_nanos')::bigint;
    v_known public.credit_transactions;
    v_entry public.credit_transactions;
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    select * into v_known from public.credit_transactions where idempotency_key = p ->> 'idempotency_key';
    if found then
        return jsonb_build_object('outcome', case when (v_known.user_id, v_known.kind, v_known.amount_nanos) = (v_user.id, 'adjustment', v_amount)
                                                  then 'repeated' else 'conflict' end,
                                  'transaction_id', v_known.id, 'user_id', v_user.id, 'balance_nanos', v_user.credits_nanos);
    elsif v_user.credits_nanos - v_user.held_nanos + v_amount < 0 then
        return jsonb_build_object('outcome', 'too_much', 'available_nanos', v_user.credits_nanos - v_user.held_nanos);
    elsif v_user.credits_nanos > 9000000000000000000 - v_amount then
        return jsonb_build_object('outcome', 'too_large');
    end if;
    v_entry := public.change_credits(v_user.id, 'adjustment', v_amount, p ->> 'actor', coalesce(p ->> 'reason', ''), p ->> 'idempotency_key', null);
    perform public.write_audit(p ->> 'actor', 'adjust_credits', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, jsonb_build_object('amount_nanos', v_amount, 'transaction_id', v_entry.id));
    return jsonb_build_object('outcome', 'adjusted', 'transaction_id', v_entry.id, 'user_id', v_user.id,
                              'balance_nanos', v_entry.balance_after_nanos);
end $$;
revoke all on function public.adjust_credits(jsonb) from public, anon, authenticated;
grant execute on function public.adjust_credits(jsonb) to service_role;


-- ============================================================================
-- analytics
-- ============================================================================

-- Analytics: what was used, summed up by the database.
--
-- usage_slots counts by quarter of an hour, so that a day of any time zone is made of whole slots; usage_days by UTC day, for long ranges.
-- What is closed is summed up now and then (by the sweep, or before a report); what is not is counted from the journal as it stands, so a
-- report is always complete. Admission and settlement pay nothing for it.

create table public.usage_slots (
    user_id bigint not null references public.users (id),
    slot timestamptz not null,
    key_id bigint not null,
    model text not null collate "C",
    provider text not null collate "C",
    environment text not null collate "C",
    endpoint text not null collate "C",
    status text not null collate "C",
    error_code text not null collate "C",
    requests bigint not null default 0,
    prompt_tokens bigint not null default 0,
    completion_tokens bigint not null default 0,
    cached_tokens bigint not null default 0,
    reasoning_tokens bigint not null default 0,
    cost_nanos bigint not null default 0,
    upstream_cost_nanos bigint not null default 0,
    overrun_nanos bigint not null default 0,
    latency_ms_total bigint not null default 0,
    latency_00 integer not null default 0, latency_01 integer not null default 0, latency_02 integer not null default 0,
    latency_03 integer not null default 0, latency_04 integer not null default 0, latency_05 integer not null default 0,
    latency_06 integer not null default 0, latency_07 integer not null default 0, latency_08 integer not null default 0,
    latency_09 integer not null default 0, latency_10 integer not null default 0, latency_11 integer not null default 0,
    latency_12 integer not null default 0, latency_13 integer not null default 0, latency_14 integer not null default 0,
    latency_15 integer not null default 0, latency_16 integer not null default 0, latency_17 integer not null default 0,
    latency_18 integer not null default 0, latency_19 integer not null default 0, latency_20 integer not null default 0,
    latency_21 integer not null default 0, latency_22 integer not null default 0, latency_23 integer not null default 0,
    primary key (user_id, slot, key_id, model, provider, environment, endpoint, status, error_code)
) with (fillfactor = 70);
comment on table public.usage_slots is 'Settled requests by quarter of an hour; adds up to usage_records.';
create index usage_slots_slot_idx on public.usage_slots (slot);
alter table public.usage_slots enable row level security;
revoke all on public.usage_slots from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.usage_slots to service_role;

create table public.usage_totals (
    slot timestamptz not null,
    model text not null collate "C",
    provider text not null collate "C",
    environment text not null collate "C",
    endpoint text not null collate "C",
    status text not null collate "C",
    error_code text not null collate "C",
    requests bigint not null default 0,
    prompt_tokens bigint not null default 0,
    completion_tokens bigint not null default 0,
    cached_tokens bigint not null default 0,
    reasoning_tokens bigint not null default 0,
    cost_nanos bigint not null default 0,
    upstream_cost_nanos bigint not null default 0,
    overrun_nanos bigint not null default 0,
    latency_ms_total bigint not null default 0,
    latency_00 integer not null default 0, latency_01 integer not null default 0, latency_02 integer not null default 0,
    latency_03 integer not null default 0, latency_04 integer not null default 0, latency_05 integer not null default 0,
    latency_06 integer not null default 0, latency_07 integer not null default 0, latency_08 integer not null default 0,
    latency_09 integer not null default 0, latency_10 integer not null default 0, latency_11 integer not null default 0,
    latency_12 integer not null default 0, latency_13 integer not null default 0, latency_14 integer not null default 0,
    latency_15 integer not null default 0, latency_16 integer not null default 0, latency_17 integer not null default 0,
    latency_18 integer not null default 0, latency_19 integer not null default 0, latency_20 integer not null default 0,
    latency_21 integer not null default 0, latency_22 integer not null default 0, latency_23 integer not null default 0,
    primary key (slot, model, provider, environment, endpoint, status, error_code)
) with (fillfactor = 70);
comment on table public.usage_totals is 'Settled requests of everybody by quarter of an hour; adds up to usage_slots.';
alter table public.usage_totals enable row level security;
revoke all on public.usage_totals from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.usage_totals to service_role;

create table public.usage_days (
    user_id bigint not null references public.users (id),
    day date not null,
    key_id bigint not null,
    model text not null collate "C",
    provider text not null collate "C",
    environment text not null collate "C",
    endpoint text not null collate "C",
    status text not null collate "C",
    error_code text not null collate "C",
    requests bigint not null default 0,
    prompt_tokens bigint not null default 0,
    completion_tokens bigint not null default 0,
    cached_tokens bigint not null default 0,
    reasoning_tokens bigint not null default 0,
    cost_nanos bigint not null default 0,
    upstream_cost_nanos bigint not null default 0,
    overrun_nanos bigint not null default 0,
    latency_ms_total bigint not null default 0,
    latency_00 integer not null default 0, latency_01 integer not null default 0, latency_02 integer not null default 0,
    latency_03 integer not null default 0, latency_04 integer not null default 0, latency_05 integer not null default 0,
    latency_06 integer not null default 0, latency_07 integer not null default 0, latency_08 integer not null default 0,
    latency_09 integer not null default 0, latency_10 integer not null default 0, latency_11 integer not null default 0,
    latency_12 integer not null default 0, latency_13 integer not null default 0, latency_14 integer not null default 0,
    latency_15 integer not null default 0, latency_16 integer not null default 0, latency_17 integer not null default 0,
    latency_18 integer not null default 0, latency_19 integer not null default 0, latency_20 integer not null default 0,
    latency_21 integer not null default 0, latency_22 integer not null default 0, latency_23 integer not null default 0,
    primary key (user_id, day, key_id, model, provider, environment, endpoint, status, error_code)
) with (fillfactor = 70);
comment on table public.usage_days is 'Settled requests by UTC day; adds up to usage_slots.';
create index usage_days_day_idx on public.usage_days (day);
alter table public.usage_days enable row level security;
revoke all on public.usage_days from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.usage_days to service_role;

create function public.latency_bounds() returns bigint[] language sql immutable set search_path = '' as $$
    select array[25, 50, 100, 150, 200, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 4000, 5000, 7500, 10000, 15000, 20000, 30000, 60000, 120000, 300000]::bigint[]
$$;
comment on function public.latency_bounds is 'Upper bounds, in milliseconds, of latency_00 and the following; the last column has none.';
revoke all on function public.latency_bounds() from public, anon, authenticated;
grant execute on function public.latency_bounds() to service_role;

create table public.usage_sums_state (
    singleton boolean primary key default true check (singleton),
    summed_until timestamptz not null default '-infinity'
);
comment on table public.usage_sums_state is 'One row: requests admitted before summed_until are in the sums, later ones are counted as they stand.';
insert into public.usage_sums_state default values;
alter table public.usage_sums_state enable row level security;
revoke all on public.usage_sums_state from public, anon, authenticated, service_role;
grant select, insert, update on public.usage_sums_state to service_role;
create index usage_records_created_idx on public.usage_records using brin (created_at) with (pages_per_range = 16);

-- Settled requests of a range of admission times, in the shape of usage_slots. The upstream's cost is the operator's: what users paid it
-- under their own keys stands in their records alone.
create function public.count_usage(p_user_id bigint, p_from timestamptz, p_until timestamptz) returns setof public.usage_slots
language sql stable set search_path = '' as $$
    select r.user_id, date_bin('15 minutes', r.created_at, '2000-01-01 00:00:00+00'), r.key_id, coalesce(r.model_used, r.model),
           coalesce(r.provider, ''), r.environment, r.endpoint, r.status, coalesce(r.error_code, ''),
           count(*), coalesce(sum(r.prompt_tokens), 0)::bigint, coalesce(sum(r.completion_tokens), 0)::bigint,
           coalesce(sum(r.cached_tokens), 0)::bigint, coalesce(sum(r.reasoning_tokens), 0)::bigint, sum(r.cost_nanos)::bigint,
           coalesce(sum(r.upstream_cost_nanos) filter (where not r.byok), 0)::bigint, sum(r.overrun_nanos)::bigint, coalesce(sum(r.latency_ms), 0)::bigint,
           (count(*) filter (where b.bucket = 0))::int, (count(*) filter (where b.bucket = 1))::int,
           (count(*) filter (where b.bucket = 2))::int, (count(*) filter (where b.bucket = 3))::int,
           (count(*) filter (where b.bucket = 4))::int, (count(*) filter (where b.bucket = 5))::int,
           (count(*) filter (where b.bucket = 6))::int, (count(*) filter (where b.bucket = 7))::int,
           (count(*) filter (where b.bucket = 8))::int, (count(*) filter (where b.bucket = 9))::int,
           (count(*) filter (where b.bucket = 10))::int, (count(*) filter (where b.bucket = 11))::int,
           (count(*) filter (where b.bucket = 12))::int, (count(*) filter (where b.bucket = 13))::int,
           (count(*) filter (where b.bucket = 14))::int, (count(*) filter (where b.bucket = 15))::int,
           (count(*) filter (where b.bucket = 16))::int, (count(*) filter (where b.bucket = 17))::int,
           (count(*) filter (where b.bucket = 18))::int, (count(*) filter (where b.bucket = 19))::int,
           (count(*) filter (where b.bucket = 20))::int, (count(*) filter (where b.bucket = 21))::int,
           (count(*) filter (where b.bucket = 22))::int, (count(*) filter (where b.bucket = 23))::int
    from public.usage_records r, lateral (select width_bucket(coalesce(r.latency_ms, 0), public.latency_bounds()) as bucket) as b
    where (p_user_id is null or r.user_id = p_user_id) and r.created_at >= p_from and r.created_at < p_until and r.status <> 'pending'
    group by 1, 2, 3, 4, 5, 6, 7, 8, 9
$$;
revoke all on function public.count_usage(bigint, timestamptz, timestamptz) from public, anon, authenticated;
grant execute on function public.count_usage(bigint, timestamptz, timestamptz) to service_role;

-- Sums up what is closed: whole slots before the oldest request that is still pending, at most a day a call. Returns whether there is more.
create function public.sum_up_usage() returns boolean language plpgsql set search_path = '' as $$
declare
    v_from timestamptz;
    v_closed timestamptz;
    v_until timestamptz;
begin
    delete from public.rate_limit_usage where subject = 'address' and coalesce(last_used_at, '-infinity') < clock_timestamp() - interval '2 hours';
    select summed_until into v_from from public.usage_sums_state for update skip locked;
    if not found then
        return false;
    end if;
    select date_bin('15 minutes', least(clock_timestamp() - interval '1 minute', min(r.created_at)), '2000-01-01 00:00:00+00') into v_closed
    from public.usage_records r
    where r.expires_at >= (select swept_until from public.gateway_state) and r.status = 'pending';
    select greatest(v_from, date_bin('15 minutes', min(r.created_at), '2000-01-01 00:00:00+00')) into v_from
    from public.usage_records r where r.created_at >= v_from;
    v_until := least(v_closed, v_from + interval '1 day');
    if v_until is null or v_until <= v_from then
        return false;
    end if;
    with counted as (
        select * from public.count_usage(null, v_from, v_until)
    ), by_slot as (
        insert into public.usage_slots select * from counted
    ), totals as (
    insert into public.usage_totals
        select s.slot, s.model, s.provider, s.environment, s.endpoint, s.status, s.error_code,
               sum(s.requests), sum(s.prompt_tokens), sum(s.completion_tokens), sum(s.cached_tokens), sum(s.reasoning_tokens),
               sum(s.cost_nanos), sum(s.upstream_cost_nanos), sum(s.overrun_nanos), sum(s.latency_ms_total), sum(s.latency_00),
               sum(s.latency_01), sum(s.latency_02), sum(s.latency_03), sum(s.latency_04), sum(s.latency_05),
               sum(s.latency_06), sum(s.latency_07), sum(s.latency_08), sum(s.latency_09), sum(s.latency_10),
               sum(s.latency_11), sum(s.latency_12), sum(s.latency_13), sum(s.latency_14), sum(s.latency_15),
               sum(s.latency_16), sum(s.latency_17), sum(s.latency_18), sum(s.latency_19), sum(s.latency_20),
               sum(s.latency_21), sum(s.latency_22), sum(s.latency_23)
        from counted s group by 1, 2, 3, 4, 5, 6, 7
    )
    insert into public.usage_days as d
    select s.user_id, (s.slot at time zone 'UTC')::date, s.key_id, s.model, s.provider, s.environment, s.endpoint, s.status, s.error_code,
           sum(s.requests), sum(s.prompt_tokens), sum(s.completion_tokens), sum(s.cached_tokens), sum(s.reasoning_tokens),
           sum(s.cost_nanos), sum(s.upstream_cost_nanos), sum(s.overrun_nanos), sum(s.latency_ms_total), sum(s.latency_00),
           sum(s.latency_01), sum(s.latency_02), sum(s.latency_03), sum(s.latency_04), sum(s.latency_05),
           sum(s.latency_06), sum(s.latency_07), sum(s.latency_08), sum(s.latency_09), sum(s.latency_10),
           sum(s.latency_11), sum(s.latency_12), sum(s.latency_13), sum(s.latency_14), sum(s.latency_15),
           sum(s.latency_16), sum(s.latency_17), sum(s.latency_18), sum(s.latency_19), sum(s.latency_20),
           sum(s.latency_21), sum(s.latency_22), sum(s.latency_23)
    from counted s group by 1, 2, 3, 4, 5, 6, 7, 8, 9
    on conflict (user_id, day, key_id, model, provider, environment, endpoint, status, error_code) do update set
           requests = d.requests + excluded.requests, prompt_tokens = d.prompt_tokens + excluded.prompt_tokens,
           completion_tokens = d.completion_tokens + excluded.completion_tokens, cached_tokens = d.cached_tokens + excluded.cached_tokens,
           reasoning_tokens = d.reasoning_tokens + excluded.reasoning_tokens, cost_nanos = d.cost_nanos + excluded.cost_nanos,
           upstream_cost_nanos = d.upstream_cost_nanos + excluded.upstream_cost_nanos, overrun_nanos = d.overrun_nanos + excluded.overrun_nanos,
           latency_ms_total = d.latency_ms_total + excluded.latency_ms_total, latency_00 = d.latency_00 + excluded.latency_00,
           latency_01 = d.latency_01 + excluded.latency_01, latency_02 = d.latency_02 + excluded.latency_02,
           latency_03 = d.latency_03 + excluded.latency_03, latency_04 = d.latency_04 + excluded.latency_04,
           latency_05 = d.latency_05 + excluded.latency_05, latency_06 = d.latency_06 + excluded.latency_06,
           latency_07 = d.latency_07 + excluded.latency_07, latency_08 = d.latency_08 + excluded.latency_08,
           latency_09 = d.latency_09 + excluded.latency_09, latency_10 = d.latency_10 + excluded.latency_10,
           latency_11 = d.latency_11 + excluded.latency_11, latency_12 = d.latency_12 + excluded.latency_12,
           latency_13 = d.latency_13 + excluded.latency_13, latency_14 = d.latency_14 + excluded.latency_14,
           latency_15 = d.latency_15 + excluded.latency_15, latency_16 = d.latency_16 + excluded.latency_16,
           latency_17 = d.latency_17 + excluded.latency_17, latency_18 = d.latency_18 + excluded.latency_18,
           latency_19 = d.latency_19 + excluded.latency_19, latency_20 = d.latency_20 + excluded.latency_20,
           latency_21 = d.latency_21 + excluded.latency_21, latency_22 = d.latency_22 + excluded.latency_22,
           latency_23 = d.latency_23 + excluded.latency_23;
    update public.usage_sums_state set summed_until = v_until where singleton;
    return v_until < v_closed;
end $$;
revoke all on function public.sum_up_usage() from public, anon, authenticated;
grant execute on function public.sum_up_usage() to service_role;

-- A record that was settled at no known cost, summed up and amended since: the sums follow.
create function public.correct_sums() returns trigger language plpgsql set search_path = '' as $$
begin
    -- Waits for a sum that is under way, and only then looks how far it came.
    perform from public.usage_sums_state for update;
    if not exists (select from public.usage_sums_state where old.created_at < summed_until) then
        return null;
    end if;
    delete from public.usage_slots s where s.user_id = new.user_id
        and s.slot = date_bin('15 minutes', new.created_at, '2000-01-01 00:00:00+00');
    insert into public.usage_slots select * from public.count_usage(
        new.user_id, date_bin('15 minutes', new.created_at, '2000-01-01 00:00:00+00'),
        date_bin('15 minutes', new.created_at, '2000-01-01 00:00:00+00') + interval '15 minutes');
    delete from public.usage_totals where slot = date_bin('15 minutes', new.created_at, '2000-01-01 00:00:00+00');
    insert into public.usage_totals
    select s.slot, s.model, s.provider, s.environment, s.endpoint, s.status, s.error_code,
           sum(s.requests), sum(s.prompt_tokens), sum(s.completion_tokens), sum(s.cached_tokens), sum(s.reasoning_tokens),
           sum(s.cost_nanos), sum(s.upstream_cost_nanos), sum(s.overrun_nanos), sum(s.latency_ms_total), sum(s.latency_00),
           sum(s.latency_01), sum(s.latency_02), sum(s.latency_03), sum(s.latency_04), sum(s.latency_05),
           sum(s.latency_06), sum(s.latency_07), sum(s.latency_08), sum(s.latency_09), sum(s.latency_10),
           sum(s.latency_11), sum(s.latency_12), sum(s.latency_13), sum(s.latency_14), sum(s.latency_15),
           sum(s.latency_16), sum(s.latency_17), sum(s.latency_18), sum(s.latency_19), sum(s.latency_20),
           sum(s.latency_21), sum(s.latency_22), sum(s.latency_23)
    from public.usage_slots s where s.slot = date_bin('15 minutes', new.created_at, '2000-01-01 00:00:00+00') group by 1, 2, 3, 4, 5, 6, 7;
    delete from public.usage_days d where d.user_id = new.user_id and d.day = (new.created_at at time zone 'UTC')::date;
    insert into public.usage_days
    select s.user_id, (s.slot at time zone 'UTC')::date, s.key_id, s.model, s.provider, s.environment, s.endpoint, s.status, s.error_code,
           sum(s.requests), sum(s.prompt_tokens), sum(s.completion_tokens), sum(s.cached_tokens), sum(s.reasoning_tokens),
           sum(s.cost_nanos), sum(s.upstream_cost_nanos), sum(s.overrun_nanos), sum(s.latency_ms_total), sum(s.latency_00),
           sum(s.latency_01), sum(s.latency_02), sum(s.latency_03), sum(s.latency_04), sum(s.latency_05),
           sum(s.latency_06), sum(s.latency_07), sum(s.latency_08), sum(s.latency_09), sum(s.latency_10),
           sum(s.latency_11), sum(s.latency_12), sum(s.latency_13), sum(s.latency_14), sum(s.latency_15),
           sum(s.latency_16), sum(s.latency_17), sum(s.latency_18), sum(s.latency_19), sum(s.latency_20),
           sum(s.latency_21), sum(s.latency_22), sum(s.latency_23)
    from public.usage_slots s
    where s.user_id = new.user_id and (s.slot at time zone 'UTC')::date = (new.created_at at time zone 'UTC')::date
    group by 1, 2, 3, 4, 5, 6, 7, 8, 9;
    return null;
end $$;
revoke all on function public.correct_sums() from public, anon, authenticated;
grant execute on function public.correct_sums() to service_role;
create trigger usage_records_amended after update of status on public.usage_records
    for each row when (old.status <> 'pending') execute function public.correct_sums();

-- The p-quantile of a latency histogram, in milliseconds, linear within its bucket; null for an empty one.
create function public.latency_quantile(p_counts numeric[], p_quantile numeric) returns bigint
language plpgsql immutable set search_path = '' as $$
declare
    v_bounds bigint[] := public.latency_bounds();
    v_wanted numeric := p_quantile * (select sum(c) from unnest(p_counts) as c);
    v_seen numeric := 0;
    v_low bigint;
    v_high bigint;
begin
    for v_i in 1 .. cardinality(p_counts) loop
        if p_counts[v_i] > 0 and v_seen + p_counts[v_i] >= v_wanted then
            v_low := case when v_i = 1 then 0 else v_bounds[v_i - 1] end;
            v_high := coalesce(v_bounds[v_i], v_low);
            return v_low + round((v_high - v_low) * (v_wanted - v_seen) / p_counts[v_i]);
        end if;
        v_seen := v_seen + p_counts[v_i];
    end loop;
    return null;
end $$;
revoke all on function public.latency_quantile(numeric[], numeric) from public, anon, authenticated;
grant execute on function public.latency_quantile(numeric[], numeric) to service_role;

-- p_bucket: hour | day | month | none; p_group: model | key | provider | environment | endpoint | status | error_code | user | none.
-- The range is widened to whole slots. In UTC, days and months over whole days come from usage_days; what asks neither for a user nor for
-- keys or users apart comes from usage_totals.
create function public.report_usage(
    p_user_id bigint, p_start timestamptz, p_end timestamptz, p_zone text, p_bucket text, p_group text, p_limit int
) returns jsonb language plpgsql stable set search_path = '' as $$
declare
    v_by_day boolean := p_zone = 'UTC' and p_bucket <> 'hour'
        and p_start = date_trunc('day', p_start, 'UTC') and p_end = date_trunc('day', p_end, 'UTC');
    v_total boolean := not v_by_day and p_user_id is null and p_group not in ('key', 'user');
    v_table text := case when v_by_day then 'usage_days' when v_total then 'usage_totals' else 'usage_slots' end;
    v_source text := case when v_by_day then '(day::timestamp at time zone ''UTC'')' else 'slot' end;
    v_bucket text := case when p_bucket = 'none' then 'null::timestamp' else format('date_trunc(%L, %s at time zone %L)', p_bucket, v_source, p_zone) end;
    v_group text := case p_group when 'none' then 'null::text' when 'key' then 'key_id::text' when 'user' then 'user_id::text'
                                 else quote_ident(p_group) end;
    v_range text := case when v_by_day then '$2::date <= day and day < $3::date' else '$2 <= slot and slot < $3' end;
    v_columns text := (
        select string_agg(quote_ident(a.attname), ', ' order by a.attnum) from pg_catalog.pg_attribute a
        where a.attrelid = (case when v_total then 'public.usage_totals' else 'public.usage_slots' end)::regclass and a.attnum > 0
          and not a.attisdropped);
    v_rows jsonb;
begin
    execute format($q$
        select coalesce(jsonb_agg(to_jsonb(x) order by x.bucket, x.cost_nanos desc, x."group"), '[]') from (
            select %s as bucket, %s as "group", sum(r.requests)::bigint as requests, sum(r.prompt_tokens)::bigint as prompt_tokens, sum(r.completion_tokens)::bigint as completion_tokens, sum(r.cached_tokens)::bigint as cached_tokens, sum(r.reasoning_tokens)::bigint as reasoning_tokens, sum(r.cost_nanos)::bigint as cost_nanos, sum(r.upstream_cost_nanos)::bigint as upstream_cost_nanos, sum(r.overrun_nanos)::bigint as overrun_nanos, sum(r.latency_ms_total)::bigint as latency_ms_total,
                   public.latency_quantile(array[sum(r.latency_00), sum(r.latency_01), sum(r.latency_02), sum(r.latency_03), sum(r.latency_04), sum(r.latency_05), sum(r.latency_06), sum(r.latency_07), sum(r.latency_08), sum(r.latency_09), sum(r.latency_10), sum(r.latency_11), sum(r.latency_12), sum(r.latency_13), sum(r.latency_14), sum(r.latency_15), sum(r.latency_16), sum(r.latency_17), sum(r.latency_18), sum(r.latency_19), sum(r.latency_20), sum(r.latency_21), sum(r.latency_22), sum(r.latency_23)], 0.5) as latency_p50_ms,
                   public.latency_quantile(array[sum(r.latency_00), sum(r.latency_01), sum(r.latency_02), sum(r.latency_03), sum(r.latency_04), sum(r.latency_05), sum(r.latency_06), sum(r.latency_07), sum(r.latency_08), sum(r.latency_09), sum(r.latency_10), sum(r.latency_11), sum(r.latency_12), sum(r.latency_13), sum(r.latency_14), sum(r.latency_15), sum(r.latency_16), sum(r.latency_17), sum(r.latency_18), sum(r.latency_19), sum(r.latency_20), sum(r.latency_21), sum(r.latency_22), sum(r.latency_23)], 0.95) as latency_p95_ms,
                   public.latency_quantile(array[sum(r.latency_00), sum(r.latency_01), sum(r.latency_02), sum(r.latency_03), sum(r.latency_04), sum(r.latency_05), sum(r.latency_06), sum(r.latency_07), sum(r.latency_08), sum(r.latency_09), sum(r.latency_10), sum(r.latency_11), sum(r.latency_12), sum(r.latency_13), sum(r.latency_14), sum(r.latency_15), sum(r.latency_16), sum(r.latency_17), sum(r.latency_18), sum(r.latency_19), sum(r.latency_20), sum(r.latency_21), sum(r.latency_22), sum(r.latency_23)], 0.99) as latency_p99_ms
            from (
                select %s from public.%I where %s and %s
                union all
                select %s from public.count_usage($1, greatest($2, (select summed_until from public.usage_sums_state)), $3)
            ) as r
            group by 1, 2 limit $4
        ) as x
    $q$, v_bucket, v_group, case when v_by_day then replace(v_columns, 'slot', 'day') else v_columns end, v_table,
         case when v_total then '$1::bigint is null' else '($1 is null or user_id = $1)' end, v_range,
         case when v_by_day then replace(v_columns, 'slot', '(slot at time zone ''UTC'')::date as day') else v_columns end)
    into v_rows using p_user_id, p_start, p_end, p_limit;
    return v_rows;
end $$;
revoke all on function public.report_usage(bigint, timestamptz, timestamptz, text, text, text, int) from public, anon, authenticated;
grant execute on function public.report_usage(bigint, timestamptz, timestamptz, text, text, text, int) to service_role;

create function public.usage_by_day(p_user_id bigint)
returns table (user_id bigint, day date, model text, requests bigint, tokens bigint, cost_nanos bigint)
language sql stable set search_path = '' as $$
    select d.user_id, d.day, d.model, d.requests, d.prompt_tokens + d.completion_tokens, d.cost_nanos
    from public.usage_days d where p_user_id is null or d.user_id = p_user_id
    union all
    select s.user_id, (s.slot at time zone 'UTC')::date, s.model, s.requests, s.prompt_tokens + s.completion_tokens, s.cost_nanos
    from public.count_usage(p_user_id, (select summed_until from public.usage_sums_state), 'infinity') s
$$;
revoke all on function public.usage_by_day(bigint) from public, anon, authenticated;
grant execute on function public.usage_by_day(bigint) to service_role;

-- A user's figures for /user/monitor, of all time, today and this month (UTC).
create function public.usage_metrics(p_user_id bigint) returns jsonb language sql stable set search_path = '' as $$
    with days as (
        select day, model, sum(requests) as requests, sum(tokens) as tokens, sum(cost_nanos) as cost
        from public.usage_by_day(p_user_id) group by 1, 2
    ), today as (select (now() at time zone 'UTC')::date as day)
    select jsonb_build_object(
        'total_requests', coalesce(sum(requests), 0), 'total_tokens', coalesce(sum(tokens), 0), 'total_cost_nanos', coalesce(sum(cost), 0),
        'requests_today', coalesce(sum(requests) filter (where d.day = t.day), 0),
        'tokens_today', coalesce(sum(tokens) filter (where d.day = t.day), 0),
        'cost_today_nanos', coalesce(sum(cost) filter (where d.day = t.day), 0),
        'requests_this_month', coalesce(sum(requests) filter (where d.day >= date_trunc('month', t.day)), 0),
        'tokens_this_month', coalesce(sum(tokens) filter (where d.day >= date_trunc('month', t.day)), 0),
        'cost_this_month_nanos', coalesce(sum(cost) filter (where d.day >= date_trunc('month', t.day)), 0),
        'most_used_model', (select m.model from days m group by m.model order by sum(m.requests) desc, m.model limit 1),
        'last_request_time', (select u.last_used_at from public.rate_limit_usage u where u.subject = 'user' and u.subject_id = p_user_id))
    from (select) as one left join days d on true left join today t on true
$$;
revoke all on function public.usage_metrics(bigint) from public, anon, authenticated;
grant execute on function public.usage_metrics(bigint) to service_role;

-- What an administrator sees of the whole installation.
create function public.system_metrics() returns jsonb language sql stable set search_path = '' as $$
    select jsonb_build_object(
        'total_users', (select count(*) from public.users where deleted_at is null),
        'active_users_today', (select count(distinct d.user_id) from public.usage_by_day(null) d where d.day = (now() at time zone 'UTC')::date),
        'metrics', public.usage_metrics(null),
        'top_users', (select coalesce(jsonb_agg(to_jsonb(t)), '[]') from (
            select d.user_id, u.username, sum(d.requests) as requests, sum(d.tokens) as tokens, sum(d.cost_nanos) as cost_nanos
            from public.usage_by_day(null) d join public.users u on u.id = d.user_id
            where d.day >= date_trunc('month', now() at time zone 'UTC') group by 1, 2 order by 5 desc, 3 desc, 1 limit 10) as t),
        'recent', (select coalesce(jsonb_agg(to_jsonb(t)), '[]') from (
            select request_id, user_id, key_id, endpoint, model, status, cost_nanos, created_at
            from public.usage_records order by request_id desc limit 20) as t))
$$;
revoke all on function public.system_metrics() from public, anon, authenticated;
grant execute on function public.system_metrics() to service_role;

-- What does not add up between the journal and its sums. No row, ever.
create function public.audit_usage() returns table (user_id bigint, part text, journal numeric, sums numeric)
language sql stable set search_path = '' as $$
    with journal as (
        select r.user_id, count(*)::numeric as requests, sum(r.cost_nanos) as cost,
               sum(coalesce(r.prompt_tokens, 0) + coalesce(r.completion_tokens, 0)) as tokens
        from public.usage_records r
        where r.status <> 'pending' and r.created_at < (select summed_until from public.usage_sums_state) group by 1
    ), slots as (
        select s.user_id, sum(s.requests) as requests, sum(s.cost_nanos) as cost, sum(s.prompt_tokens + s.completion_tokens) as tokens
        from public.usage_slots s group by 1
    ), days as (
        select d.user_id, sum(d.requests) as requests, sum(d.cost_nanos) as cost, sum(d.prompt_tokens + d.completion_tokens) as tokens
        from public.usage_days d group by 1
    ), compared as (
        select u.id, x.part, x.journal, x.sums from public.users u
        left join journal j on j.user_id = u.id left join slots s on s.user_id = u.id left join days d on d.user_id = u.id,
        lateral (values ('slot requests', j.requests, s.requests), ('slot cost', j.cost, s.cost), ('slot tokens', j.tokens, s.tokens),
                        ('day requests', j.requests, d.requests), ('day cost', j.cost, d.cost), ('day tokens', j.tokens, d.tokens)
                ) as x (part, journal, sums)
    )
    select c.id, c.part, coalesce(c.journal, 0), coalesce(c.sums, 0) from compared c where coalesce(c.journal, 0) <> coalesce(c.sums, 0)
    union all
    select null, 'totals', s.cost, t.cost
    from (select coalesce(sum(cost_nanos), 0) + coalesce(sum(requests), 0) as cost from public.usage_slots) s,
         (select coalesce(sum(cost_nanos), 0) + coalesce(sum(requests), 0) as cost from public.usage_totals) t
    where s.cost <> t.cost
$$;
revoke all on function public.audit_usage() from public, anon, authenticated;
grant execute on function public.audit_usage() to service_role;


-- ============================================================================
-- spend_control
-- ============================================================================

-- What spend control, receipts and stored answers keep. Admission and settlement write most of it, in their own round trips.

-- What a receipt shows beyond the record itself, and whose budget and whose upstream key it was.
alter table public.usage_records
    add column end_user varchar(256),
    add column byok boolean not null default false,
    add column cache_hit boolean not null default false,
    add column price_basis jsonb,
    add column balance_after_nanos bigint;
comment on column public.usage_records.price_basis is
    'What the hold was made of, nano-dollars as text, without markup: fixed_nanos, output_nanos (one output token), max_price as sent.';
comment on column public.usage_records.balance_after_nanos is 'The account''s credits right after this request was settled.';
comment on column public.usage_records.byok is 'Sent with the user''s own upstream key: metered and limited, not charged.';

alter table public.api_keys_new add column cache_ttl_seconds int check (cache_ttl_seconds between 1 and 86400);
comment on column public.api_keys_new.cache_ttl_seconds is 'Requests of this key use the response cache unless they say otherwise; null: only those that ask.';

-- How much of its budget (percent: 50, 80, 100) a key has been said to have spent in the window.
alter table public.rate_limit_usage add column budget_level smallint not null default 0;

-- Finished answers: of requests with an Idempotency-Key, and of the response cache.
create table public.stored_answers (
    id bigint generated always as identity primary key,
    kind text not null check (kind in ('idempotency', 'cache')),
    user_id bigint not null references public.users (id),
    place text not null check (place ~ '^[0-9a-f]{64}$'),
    fingerprint text not null check (fingerprint ~ '^[0-9a-f]{64}$'),
    request_id uuid not null,
    state text not null check (state in ('running', 'finished')),
    answer text check (length(answer) <= 2000000),
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null,
    constraint stored_answers_finished_has_answer check ((state = 'finished') = (answer is not null))
);
comment on table public.stored_answers is
    'Encrypted answers by place: SHA-256 of environment, path and key (idempotency) or of environment, path and canonical body (cache).';
create unique index stored_answers_place_key on public.stored_answers (user_id, kind, place);
comment on index public.stored_answers_place_key is 'Of two requests with one key, one runs.';
create index stored_answers_request_idx on public.stored_answers (request_id);
create index stored_answers_expiry_idx on public.stored_answers (expires_at);
alter table public.stored_answers enable row level security;
revoke all on public.stored_answers from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.stored_answers to service_role;
revoke all on sequence public.stored_answers_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.stored_answers_id_seq to service_role;

-- A user's own upstream key.
create table public.provider_keys (
    user_id bigint primary key references public.users (id),
    encrypted_key text not null check (length(encrypted_key) <= 2000),
    label text not null check (length(label) between 1 and 64),
    is_active boolean not null default true,
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp()
);
comment on table public.provider_keys is 'Encrypted at rest; `label` is what may be shown of it.';
alter table public.provider_keys enable row level security;
revoke all on public.provider_keys from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.provider_keys to service_role;

-- Budgets of the customers of a user, named by them; '*' is for each who has none of their own.
create table public.end_user_budgets (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    end_user text not null check (length(end_user) between 1 and 256),
    budget_nanos bigint not null check (budget_nanos >= 0),
    budget_window text not null check (budget_window in ('day', 'week', 'month', 'lifetime')),
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp()
);
create unique index end_user_budgets_name_key on public.end_user_budgets (user_id, end_user);
alter table public.end_user_budgets enable row level security;
revoke all on public.end_user_budgets from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.end_user_budgets to service_role;
revoke all on sequence public.end_user_budgets_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.end_user_budgets_id_seq to service_role;

create table public.end_user_usage (
    user_id bigint not null references public.users (id),
    end_user text not null check (length(end_user) between 1 and 256),
    budget_since timestamptz not null default '-infinity',
    budget_spent_nanos bigint not null default 0,
    budget_held_nanos bigint not null default 0,
    budget_level smallint not null default 0,
    constraint end_user_usage_pkey primary key (user_id, end_user),
    constraint end_user_usage_sound check (least(budget_spent_nanos, budget_held_nanos) >= 0)
) with (fillfactor = 50);
comment on table public.end_user_usage is 'Counters of end users that a budget applies to; locked with their user.';
alter table public.end_user_usage enable row level security;
revoke all on public.end_user_usage from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.end_user_usage to service_role;

-- Soft limits: what was reached, once for each level of each window, and who is to be told.
create table public.budget_events (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    key_id bigint references public.api_keys_new (id),
    end_user text check (length(end_user) between 1 and 256),
    level smallint not null check (level in (50, 80, 100)),
    budget_nanos bigint not null check (budget_nanos >= 0),
    spent_nanos bigint not null check (spent_nanos >= 0),
    budget_window text not null check (budget_window in ('day', 'week', 'month', 'lifetime')),
    window_start timestamptz not null,
    request_id uuid not null,
    created_at timestamptz not null default clock_timestamp(),
    constraint budget_events_subject check ((key_id is null) <> (end_user is null))
);
create index budget_events_user_idx on public.budget_events (user_id, id desc);
alter table public.budget_events enable row level security;
revoke all on public.budget_events from public, anon, authenticated, service_role;
grant select, insert, delete on public.budget_events to service_role;
revoke all on sequence public.budget_events_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.budget_events_id_seq to service_role;

create table public.webhooks (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    url text not null check (length(url) between 9 and 2000),
    encrypted_secret text not null check (length(encrypted_secret) <= 2000),
    is_active boolean not null default true,
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp()
);
create index webhooks_user_idx on public.webhooks (user_id);
alter table public.webhooks enable row level security;
revoke all on public.webhooks from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.webhooks to service_role;
revoke all on sequence public.webhooks_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.webhooks_id_seq to service_role;

-- The outbox: settlement writes it in the transaction that reaches the level, the sweep sends it.
create table public.webhook_deliveries (
    id bigint generated always as identity primary key,
    event_id bigint not null references public.budget_events (id) on delete cascade,
    webhook_id bigint not null references public.webhooks (id) on delete cascade,
    user_id bigint not null references public.users (id),
    attempts int not null default 0,
    next_attempt_at timestamptz not null default clock_timestamp(),
    delivered_at timestamptz,
    failed_at timestamptz,
    last_status int,
    last_error text check (length(last_error) <= 500),
    created_at timestamptz not null default clock_timestamp(),
    constraint webhook_deliveries_one_end check (delivered_at is null or failed_at is null)
);
create index webhook_deliveries_due_idx on public.webhook_deliveries (next_attempt_at) where delivered_at is null and failed_at is null;
create index webhook_deliveries_user_idx on public.webhook_deliveries (user_id, id desc);
alter table public.webhook_deliveries enable row level security;
revoke all on public.webhook_deliveries from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.webhook_deliveries to service_role;
revoke all on sequence public.webhook_deliveries_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.webhook_deliveries_id_seq to service_role;


-- ============================================================================
-- admission_of_spend_control
-- ============================================================================

-- Spend control inside the two hot calls: answers that are given again (Idempotency-Key, response cache), budgets of end users, soft limits,
-- users' own upstream keys, holds that are raised. What a request does not use costs it nothing: a table is only looked at when the
-- item, or a row that is read anyway, says so.

alter table public.users
    add column has_provider_key boolean not null default false,
    add column has_end_user_budgets boolean not null default false;
comment on column public.users.has_provider_key is 'Kept by a trigger: whether there is an active row in provider_keys.';
comment on column public.users.has_end_user_budgets is 'Kept by a trigger: whether there are rows in end_user_budgets.';

alter table public.usage_records
    add column has_idempotency_key boolean not null default false,
    add column has_end_user_budget boolean not null default false;
comment on column public.usage_records.has_idempotency_key is 'A row of stored_answers waits for how this request ends.';
comment on column public.usage_records.has_end_user_budget is 'Its hold counts in end_user_usage, and so does its cost.';

-- Answers are encrypted: nothing to compress.
alter table public.stored_answers alter column answer set storage external;
comment on column public.stored_answers.answer is
    'Empty for a finished request that was charged and whose answer was not kept: the same key is refused, as a second run would be charged again.';
comment on column public.stored_answers.fingerprint is
    'Of an idempotency key: SHA-256 of the raw body. Of the cache: which encryption key sealed the answer.';

alter type public.admission_item
    add attribute end_user text,
    add attribute price_basis jsonb,
    add attribute idempotency jsonb,
    add attribute cache jsonb,
    add attribute byok boolean;
alter type public.settlement_item
    add attribute stored_answer text,
    add attribute cache jsonb;
comment on type public.admission_item is
    'idempotency: {place, fingerprint, ttl_seconds}. cache: {place, fingerprint, ttl_seconds, clear}; without ttl_seconds the key''s own '
    'cache_ttl_seconds decides, and none means no cache. The answer''s cache_ttl is what applies; without `cache` it is the key''s own. byok: this instance sends under a user''s own upstream key where there is one; '
    'one of an older release does not, and pays for what it sends.';
comment on type public.settlement_item is
    'stored_answer: the sealed answer, for the idempotency key and the cache. cache: {place, fingerprint, ttl_seconds} where it is to be cached.';

-- Flags and what a deleted account leaves behind. Whoever writes these tables locks the user first, as everywhere: a trigger that did it
-- alone would come after the row's own lock, and two writers could meet in opposite orders.

create function public.note_spend_settings() returns trigger language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := coalesce(new.user_id, old.user_id);
begin
    -- Locked by a statement of its own: what is counted below is then what the others have left.
    perform from public.users where id = v_user_id for no key update;
    update public.users u set has_provider_key = f.provider_key, has_end_user_budgets = f.budgets
    from (select exists (select from public.provider_keys p where p.user_id = v_user_id and p.is_active) as provider_key,
                 exists (select from public.end_user_budgets b where b.user_id = v_user_id) as budgets) as f
    where u.id = v_user_id and (u.has_provider_key, u.has_end_user_budgets) is distinct from (f.provider_key, f.budgets);
    return null;
end $$;
revoke all on function public.note_spend_settings() from public, anon, authenticated;
grant execute on function public.note_spend_settings() to service_role;
create trigger provider_keys_noted after insert or delete or update of is_active on public.provider_keys
    for each row execute function public.note_spend_settings();
create trigger end_user_budgets_noted after insert or delete on public.end_user_budgets
    for each row execute function public.note_spend_settings();

create function public.forget_account() returns trigger language plpgsql set search_path = '' as $$
begin
    delete from public.provider_keys where user_id = new.id;
    delete from public.webhooks where user_id = new.id;
    delete from public.budget_events where user_id = new.id;
    delete from public.end_user_budgets where user_id = new.id;
    delete from public.end_user_usage where user_id = new.id;
    delete from public.stored_answers where user_id = new.id;
    return null;
end $$;
comment on function public.forget_account is 'Secrets, addresses, names of customers and answers of a deleted account go with it.';
revoke all on function public.forget_account() from public, anon, authenticated;
grant execute on function public.forget_account() to service_role;
create trigger users_deleted_forget after update of deleted_at on public.users
    for each row when (old.deleted_at is null and new.deleted_at is not null) execute function public.forget_account();

-- A hold may be raised while its request runs; the rest of what a record is never changes.
drop trigger usage_records_identity on public.usage_records;
create trigger usage_records_identity before update of request_id, user_id, key_id, mode, environment, markup, created_at
    on public.usage_records for each row execute function public.refuse_identity_change();
create trigger usage_records_hold before update of hold_nanos on public.usage_records
    for each row when (old.status <> 'pending' or new.status <> 'pending' or new.hold_nanos < old.hold_nanos)
    execute function public.refuse_identity_change();

-- Budgets of end users. Counters are locked with their user.

-- What the budget of this end user leaves (their own, else that of '*'), null where none applies.
create function public.end_user_left(p_user_id bigint, p_end_user text, p_now timestamptz) returns bigint
language plpgsql stable as $$
declare
    v_budget public.end_user_budgets;
    v_usage public.end_user_usage;
begin
    v_budget := public.end_user_budget(p_user_id, p_end_user);
    if v_budget.id is null then
        return null;
    end if;
    select * into v_usage from public.end_user_usage where user_id = p_user_id and end_user = p_end_user;
    if v_usage.budget_since < public.budget_start(v_budget.budget_window, p_now) then
        v_usage.budget_spent_nanos := 0;
    end if;
    return v_budget.budget_nanos - coalesce(v_usage.budget_spent_nanos + v_usage.budget_held_nanos, 0);
end $$;

create function public.end_user_budget(p_user_id bigint, p_end_user text) returns public.end_user_budgets
language plpgsql stable as $$
declare
    v_budget public.end_user_budgets;
begin
    select * into v_budget from public.end_user_budgets b where b.user_id = p_user_id and b.end_user in (p_end_user, '*')
    order by b.end_user = p_end_user desc limit 1;
    return v_budget;
end $$;
revoke all on function public.end_user_budget(bigint, text) from public, anon, authenticated;
grant execute on function public.end_user_budget(bigint, text) to service_role;
revoke all on function public.end_user_left(bigint, text, timestamptz) from public, anon, authenticated;
grant execute on function public.end_user_left(bigint, text, timestamptz) to service_role;

create function public.hold_for_end_user(p_user_id bigint, p_end_user text, p_hold bigint) returns void
language plpgsql as $$
begin
    insert into public.end_user_usage as u (user_id, end_user, budget_held_nanos) values (p_user_id, p_end_user, p_hold)
    on conflict (user_id, end_user) do update set budget_held_nanos = u.budget_held_nanos + excluded.budget_held_nanos;
end $$;
revoke all on function public.hold_for_end_user(bigint, text, bigint) from public, anon, authenticated;
grant execute on function public.hold_for_end_user(bigint, text, bigint) to service_role;

-- Soft limits.

create function public.budget_level(p_spent bigint, p_budget bigint) returns smallint language plpgsql immutable as $$
declare
    v_percent numeric := case when p_budget > 0 then p_spent * 100.0 / p_budget else 0 end;
begin
    return case when v_percent >= 100 then 100 when v_percent >= 80 then 80 when v_percent >= 50 then 50 else 0 end;
end $$;
revoke all on function public.budget_level(bigint, bigint) from public, anon, authenticated;
grant execute on function public.budget_level(bigint, bigint) to service_role;

-- The level that is to be remembered after p_cost more was spent. A level that is reached for the first time in its window is an event,
-- with a delivery for each active webhook; of several reached at once only the highest is told. What was reached before counts by
-- today's budget: after a budget was raised its levels are told anew, after it was lowered the level that this reached is told.
create function public.note_budget_level(
    p_record public.usage_records, p_end_user text, p_budget bigint, p_window text, p_since timestamptz, p_spent bigint, p_cost bigint,
    p_level smallint
) returns smallint language plpgsql as $$
declare
    v_level smallint := public.budget_level(p_spent, p_budget);
    v_event bigint;
begin
    if v_level > least(p_level, public.budget_level(p_spent - p_cost, p_budget)) then
        insert into public.budget_events (user_id, key_id, end_user, level, budget_nanos, spent_nanos, budget_window, window_start, request_id)
        values (p_record.user_id, case when p_end_user is null then p_record.key_id end, p_end_user, v_level, p_budget, p_spent, p_window,
                p_since, p_record.request_id)
        returning id into v_event;
        insert into public.webhook_deliveries (event_id, webhook_id, user_id)
        select v_event, w.id, w.user_id from public.webhooks w where w.user_id = p_record.user_id and w.is_active order by w.id;
    end if;
    return v_level;
end $$;
revoke all on function public.note_budget_level(public.usage_records, text, bigint, text, timestamptz, bigint, bigint, smallint)
    from public, anon, authenticated;
grant execute on function public.note_budget_level(public.usage_records, text, bigint, text, timestamptz, bigint, bigint, smallint)
    to service_role;

-- Answers that are given again.

-- A hold as those get it who are to find out what became of it.
create function public.hold_json(p_record public.usage_records) returns jsonb language plpgsql stable as $$
begin
    return jsonb_build_object('request_id', p_record.request_id, 'generation_id', p_record.generation_id, 'mode', p_record.mode,
                              'environment', p_record.environment, 'byok', p_record.byok,
                              'provider_key', case when p_record.byok then (select k.encrypted_key from public.provider_keys k
                                                                            where k.user_id = p_record.user_id) end);
end $$;
revoke all on function public.hold_json(public.usage_records) from public, anon, authenticated;
grant execute on function public.hold_json(public.usage_records) to service_role;

-- What this idempotency key has been used for, null where it is free. A replay is no admitted request: it is neither recorded nor
-- charged, and no limit stands in its way, as its answer has been paid for.
-- Outcomes: replayed, idempotency_running (with `expired`, where its instance seems to be gone), idempotency_conflict (another body),
-- idempotency_not_kept (charged, but its answer was not kept).
create function public.check_idempotency(p_item public.admission_item, p_key public.api_keys_new, p_now timestamptz) returns jsonb
language plpgsql as $$
declare
    v_row public.stored_answers;
    v_record public.usage_records;
    v_base jsonb;
begin
    select * into v_row from public.stored_answers
    where user_id = p_key.user_id and kind = 'idempotency' and place = p_item.idempotency ->> 'place';
    if not found or (v_row.state = 'finished' and v_row.expires_at <= p_now) then
        return null;
    end if;
    select * into v_record from public.usage_records where request_id = v_row.request_id;
    if v_row.state = 'running' and v_record.status is distinct from 'pending' then
        return null;
    end if;
    v_base := jsonb_build_object('user_id', p_key.user_id, 'key_id', p_key.id, 'environment', v_record.environment,
                                 'original_request_id', v_row.request_id, 'status', v_record.status, 'cost_nanos', v_record.cost_nanos,
                                 'balance_after_nanos', v_record.balance_after_nanos);
    if v_row.fingerprint <> p_item.idempotency ->> 'fingerprint' then
        return v_base || jsonb_build_object('outcome', 'idempotency_conflict');
    elsif v_row.state = 'running' then
        return v_base || jsonb_build_object(
            'outcome', 'idempotency_running',
            'retry_after', least(30, greatest(1, ceil(extract(epoch from p_now - v_record.created_at) / 2)))::int,
            'expired', case when v_record.expires_at <= p_now then jsonb_build_array(public.hold_json(v_record)) end);
    elsif v_row.answer = '' then
        return v_base || jsonb_build_object('outcome', 'idempotency_not_kept');
    end if;
    return v_base || jsonb_build_object('outcome', 'replayed', 'answer', v_row.answer,
                                        'age', floor(extract(epoch from p_now - v_row.created_at))::bigint,
                                        'tokens', coalesce(v_record.prompt_tokens, 0) + coalesce(v_record.completion_tokens, 0));
end $$;
revoke all on function public.check_idempotency(public.admission_item, public.api_keys_new, timestamptz) from public, anon, authenticated;
grant execute on function public.check_idempotency(public.admission_item, public.api_keys_new, timestamptz) to service_role;

-- The key is this request's from now on, running or, with an answer from the cache, finished.
create function public.claim_idempotency(p_item public.admission_item, p_user_id bigint, p_answer text, p_now timestamptz) returns void
language plpgsql as $$
begin
    insert into public.stored_answers as a (kind, user_id, place, fingerprint, request_id, state, answer, created_at, expires_at)
    values ('idempotency', p_user_id, p_item.idempotency ->> 'place', p_item.idempotency ->> 'fingerprint', p_item.request_id,
            case when p_answer is null then 'running' else 'finished' end, p_answer, p_now,
            p_now + make_interval(secs => greatest((p_item.idempotency ->> 'ttl_seconds')::int, p_item.ttl_seconds)))
    on conflict (user_id, kind, place) do update set
        fingerprint = excluded.fingerprint, request_id = excluded.request_id, state = excluded.state, answer = excluded.answer,
        created_at = excluded.created_at, expires_at = excluded.expires_at;
end $$;
revoke all on function public.claim_idempotency(public.admission_item, bigint, text, timestamptz) from public, anon, authenticated;
grant execute on function public.claim_idempotency(public.admission_item, bigint, text, timestamptz) to service_role;

-- The request that had the key has ended: its answer is kept; without one the key is free again, unless somebody paid for the request.
create function public.finish_idempotency(p_request_id uuid, p_answer text, p_paid boolean) returns void
language plpgsql as $$
begin
    if p_answer is null and not p_paid then
        delete from public.stored_answers where request_id = p_request_id and kind = 'idempotency';
    else
        update public.stored_answers set state = 'finished', answer = coalesce(p_answer, '')
        where request_id = p_request_id and kind = 'idempotency' and state = 'running';
    end if;
end $$;
revoke all on function public.finish_idempotency(uuid, text, boolean) from public, anon, authenticated;
grant execute on function public.finish_idempotency(uuid, text, boolean) to service_role;

-- The cached answer of this place, sealed by an encryption key that the instance still seals with; cleared first where that is wanted.
create function public.find_cached(p_cache jsonb, p_user_id bigint, p_now timestamptz) returns public.stored_answers
language plpgsql as $$
declare
    v_row public.stored_answers;
begin
    if (p_cache ->> 'clear')::boolean then
        delete from public.stored_answers where user_id = p_user_id and kind = 'cache' and place = p_cache ->> 'place';
    else
        select * into v_row from public.stored_answers
        where user_id = p_user_id and kind = 'cache' and place = p_cache ->> 'place' and fingerprint = p_cache ->> 'fingerprint'
          and expires_at > p_now;
    end if;
    return v_row;
end $$;
revoke all on function public.find_cached(jsonb, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.find_cached(jsonb, bigint, timestamptz) to service_role;

create function public.keep_in_cache(p_cache jsonb, p_record public.usage_records, p_answer text, p_now timestamptz) returns void
language plpgsql as $$
begin
    -- The user is locked: whether the account is deleted does not change meanwhile.
    insert into public.stored_answers (kind, user_id, place, fingerprint, request_id, state, answer, created_at, expires_at)
    select 'cache', u.id, p_cache ->> 'place', p_cache ->> 'fingerprint', p_record.request_id, 'finished', p_answer, p_now,
           p_now + make_interval(secs => (p_cache ->> 'ttl_seconds')::int)
    from public.users u where u.id = p_record.user_id and u.deleted_at is null
    on conflict (user_id, kind, place) do update set
        fingerprint = excluded.fingerprint, request_id = excluded.request_id, answer = excluded.answer,
        created_at = excluded.created_at, expires_at = excluded.expires_at;
end $$;
revoke all on function public.keep_in_cache(jsonb, public.usage_records, text, timestamptz) from public, anon, authenticated;
grant execute on function public.keep_in_cache(jsonb, public.usage_records, text, timestamptz) to service_role;

create function public.cached_json(p_row public.stored_answers, p_now timestamptz) returns jsonb language plpgsql immutable as $$
begin
    return jsonb_build_object('outcome', 'cached', 'answer', p_row.answer, 'original_request_id', p_row.request_id,
                              'age', floor(extract(epoch from p_now - p_row.created_at))::bigint);
end $$;
revoke all on function public.cached_json(public.stored_answers, timestamptz) from public, anon, authenticated;
grant execute on function public.cached_json(public.stored_answers, timestamptz) to service_role;

-- At most a thousand answers whose time is over; returns how many. It waits for nobody: a row that admission is working on is not expired
-- any more when that is done.
create function public.delete_expired_answers() returns int language plpgsql set search_path = '' as $$
declare
    v_count int;
begin
    with expired as (
        select a.id from public.stored_answers a
        where a.expires_at <= clock_timestamp() and (a.state = 'finished' or not exists (
            select from public.usage_records r where r.request_id = a.request_id and r.status = 'pending'))
        order by a.expires_at limit 1000 for update skip locked
    )
    delete from public.stored_answers a using expired e where a.id = e.id;
    get diagnostics v_count = row_count;
    return v_count;
end $$;
revoke all on function public.delete_expired_answers() from public, anon, authenticated;
grant execute on function public.delete_expired_answers() to service_role;

-- Admission.

drop function public.recount_user(bigint, bigint, timestamptz);
-- Up to four expired holds of a user, once in ten seconds, and slots and held budgets counted anew from the journal.
create function public.recount_user(p_user_id bigint, p_key_id bigint, p_end_user text, p_now timestamptz) returns jsonb
language plpgsql as $$
declare
    v_since timestamptz;
    v_expired jsonb;
begin
    select pending_since into v_since from public.rate_limit_usage
    where subject = 'user' and subject_id = p_user_id and recounted_at < p_now - interval '10 seconds';
    if not found then
        return null;
    end if;
    with pending as (
        select r.* from public.usage_records r
        where r.user_id = p_user_id and r.created_at >= v_since and r.status = 'pending'
    ), recounted as (
        update public.rate_limit_usage u set recounted_at = p_now,
            pending_since = coalesce((select min(created_at) from pending), p_now),
            slots = (select count(*) from pending),
            test_slots = (select count(*) from pending where environment = 'test')
        where u.subject = 'user' and u.subject_id = p_user_id
    ), recounted_key as (
        update public.rate_limit_usage u set
            slots = (select count(*) from pending where key_id = p_key_id),
            budget_held_nanos = coalesce((select sum(hold_nanos) from pending where key_id = p_key_id), 0)
        where u.subject = 'key' and u.subject_id = p_key_id
    ), recounted_end_user as (
        update public.end_user_usage u set
            budget_held_nanos = coalesce((select sum(hold_nanos) from pending where end_user = p_end_user and has_end_user_budget), 0)
        where u.user_id = p_user_id and u.end_user = p_end_user
    )
    select jsonb_agg(public.hold_json(e.record)) into v_expired
    from (select p::public.usage_records as record from pending p where p.expires_at <= p_now order by random() limit 4) as e;
    return v_expired;
end $$;
comment on function public.recount_user is 'So that a crash leaks neither money nor slots for longer than its hold''s time to live, with no worker running.';
revoke all on function public.recount_user(bigint, bigint, text, timestamptz) from public, anon, authenticated;
grant execute on function public.recount_user(bigint, bigint, text, timestamptz) to service_role;

drop function public.record_admission(public.admission_item, public.api_keys_new, public.rate_limit_usage, public.rate_limit_usage, bigint,
                                      bigint, timestamptz);
-- Counts and writes the record of a request that nothing refuses: pending with its hold, or, with an answer from the cache, completed
-- at no cost and no tokens.
create function public.record_admission(
    p_item public.admission_item, p_key public.api_keys_new, p_key_usage public.rate_limit_usage, p_user_usage public.rate_limit_usage,
    p_granted bigint, p_hold bigint, p_byok boolean, p_end_user_budget boolean, p_cached_balance bigint, p_now timestamptz
) returns void language plpgsql as $$
declare
    v_cached boolean := p_cached_balance is not null;
    v_need bigint := case when v_cached then 0 else p_item.prompt_estimate end;
    v_slot int := (not v_cached)::int;
    v_none bigint := case when v_cached then 0 end;
begin
    insert into public.usage_records (request_id, client_request_id, user_id, key_id, mode, environment, endpoint, model, prompt_estimate,
                                      output_granted, hold_nanos, markup, streamed, created_at, expires_at, end_user, byok, price_basis,
                                      has_idempotency_key, has_end_user_budget, cache_hit, status, settlement_source, settled_at,
                                      balance_after_nanos, prompt_tokens, completion_tokens, upstream_cost_nanos)
    values (p_item.request_id, left(p_item.client_request_id, 256), p_key.user_id, p_key.id, p_item.mode, p_key.environment_tag, p_item.endpoint,
            p_item.models[1], v_need, p_granted, p_hold, p_item.markup, p_item.streamed, p_now,
            p_now + make_interval(secs => p_item.ttl_seconds), p_item.end_user, p_byok, p_item.price_basis,
            p_item.idempotency is not null, p_end_user_budget, v_cached, case when v_cached then 'completed' else 'pending' end,
            case when v_cached then 'usage' end, case when v_cached then p_now end, p_cached_balance, v_none, v_none, v_none);
    if p_hold > 0 then
        update public.users set held_nanos = held_nanos + p_hold where id = p_key.user_id;
        if p_end_user_budget then
            perform public.hold_for_end_user(p_key.user_id, p_item.end_user, p_hold);
        end if;
    end if;
    update public.rate_limit_usage set
        burst_ring = public.count_in_ring(p_user_usage.burst_ring, 11, null, 1, v_need),
        minute_ring = public.count_in_ring(p_user_usage.minute_ring, 7, null, 1, v_need),
        hour_ring = public.count_in_ring(p_user_usage.hour_ring, 13, null, 1, v_need),
        day_ring = public.count_in_ring(p_user_usage.day_ring, 25, null, 1, v_need),
        plan_day = p_user_usage.plan_day, plan_day_requests = p_user_usage.plan_day_requests + 1,
        plan_day_tokens = p_user_usage.plan_day_tokens + v_need,
        plan_month = p_user_usage.plan_month, plan_month_requests = p_user_usage.plan_month_requests + 1,
        plan_month_tokens = p_user_usage.plan_month_tokens + v_need,
        slots = slots + v_slot, test_slots = test_slots + case when p_key.environment_tag = 'test' then v_slot else 0 end,
        requests_used = requests_used + 1, last_used_at = p_now,
        pending_since = case when slots = 0 then p_now else least(pending_since, p_now) end
    where subject = 'user' and subject_id = p_key.user_id;
    update public.rate_limit_usage set
        burst_ring = public.count_in_ring(p_key_usage.burst_ring, 11, null, 1, v_need),
        minute_ring = public.count_in_ring(p_key_usage.minute_ring, 7, null, 1, v_need),
        hour_ring = public.count_in_ring(p_key_usage.hour_ring, 13, null, 1, v_need),
        day_ring = public.count_in_ring(p_key_usage.day_ring, 25, null, 1, v_need),
        slots = slots + v_slot, requests_used = requests_used + 1, last_used_at = p_now,
        budget_since = p_key_usage.budget_since, budget_spent_nanos = p_key_usage.budget_spent_nanos, budget_level = p_key_usage.budget_level,
        budget_held_nanos = budget_held_nanos + p_hold
    where subject = 'key' and subject_id = p_key.id;
end $$;
revoke all on function public.record_admission(public.admission_item, public.api_keys_new, public.rate_limit_usage,
    public.rate_limit_usage, bigint, bigint, boolean, boolean, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.record_admission(public.admission_item, public.api_keys_new, public.rate_limit_usage,
    public.rate_limit_usage, bigint, bigint, boolean, boolean, bigint, timestamptz) to service_role;

-- The refusal of a request that the least of credits, key budget and end user's budget does not cover.
create function public.refuse_for_money(
    p_item public.admission_item, p_credits bigint, p_held bigint, p_available bigint, p_budget bigint, p_end_user_left bigint, p_granted bigint
) returns jsonb language plpgsql stable as $$
begin
    return jsonb_build_object(
        'outcome', case when p_end_user_left < least(p_available, p_budget) then 'end_user_budget'
                        when p_budget < p_available then 'budget' else 'credits' end,
        'needed_nanos', ceil((p_item.fixed_nanos + p_item.output_nanos * p_item.min_output) * p_item.markup),
        'available_nanos', greatest(0, least(p_available, p_budget, p_end_user_left)), 'balance_nanos', p_credits,
        'held_nanos', p_held, 'affordable_output', greatest(0, p_granted));
end $$;
revoke all on function public.refuse_for_money(public.admission_item, bigint, bigint, bigint, bigint, bigint, bigint)
    from public, anon, authenticated;
grant execute on function public.refuse_for_money(public.admission_item, bigint, bigint, bigint, bigint, bigint, bigint) to service_role;

-- The rate limits' state that admission would report for a request of no tokens; counts nothing.
create function public.verified_limits(p_key public.api_keys_new, p_user public.users, p_now timestamptz) returns jsonb
language plpgsql stable as $$
declare
    v_none public.rate_limit_usage;
    v_user_usage public.rate_limit_usage;
    v_key_usage public.rate_limit_usage;
    v_key_limits public.rate_limit_configs;
begin
    v_none.burst_ring := public.empty_ring(11);
    v_none.minute_ring := public.empty_ring(7);
    v_none.hour_ring := public.empty_ring(13);
    v_none.day_ring := public.empty_ring(25);
    v_none.plan_day := '-infinity';
    v_none.plan_month := '-infinity';
    v_none.slots := 0;
    v_none.test_slots := 0;
    select * into v_user_usage from public.rate_limit_usage where subject = 'user' and subject_id = p_user.id;
    if not found then
        v_user_usage := v_none;
    end if;
    select * into v_key_limits from public.rate_limit_configs where subject = 'key' and subject_id = p_key.id;
    if found then
        select * into v_key_usage from public.rate_limit_usage where subject = 'key' and subject_id = p_key.id;
        if v_key_usage.day_ring is null then -- not limited before, so nothing was counted
            v_none.slots := coalesce(v_key_usage.slots, 0);
            v_key_usage := v_none;
        end if;
    end if;
    return public.limits_json(public.check_all_limits(
        p_key, p_user, public.current_plan(p_user, p_now), v_key_limits, public.advance_usage(v_key_usage, p_now, null),
        public.advance_usage(v_user_usage, p_now, null), 0, p_now), p_now);
end $$;
comment on function public.verified_limits is 'What the headers of management answers say; management requests themselves are not counted.';
revoke all on function public.verified_limits(public.api_keys_new, public.users, timestamptz) from public, anon, authenticated;
grant execute on function public.verified_limits(public.api_keys_new, public.users, timestamptz) to service_role;

comment on function public.admit_requests is
    'Decides for each item (admission_item) in order. Answers carry request_id and outcome: admitted, cached, replayed, verified, busy, '
    'wrong_mode, failed, or the code of a refusal.';

-- Settlement.

drop function public.write_settlement(public.settlement_item, bigint, bigint, bigint, timestamptz); -- settle_one does it itself
drop function public.release_counters(public.usage_records, text, bigint, bigint, timestamptz);
-- Gives slots and held budgets back, corrects the token counters, and adds the cost to the budgets of key and end user.
create function public.release_counters(p_record public.usage_records, p_delta bigint, p_cost bigint, p_now timestamptz) returns void
language plpgsql as $$
declare
    v_then bigint := extract(epoch from p_record.created_at) * 1000;
    v_ms bigint := extract(epoch from p_now) * 1000;
    v_day date := (p_record.created_at at time zone 'UTC')::date;
    v_month date := date_trunc('month', p_record.created_at at time zone 'UTC')::date;
    v_first boolean := p_record.status = 'pending';
    v_released int := v_first::int;
    v_window text;
    v_budget bigint;
    v_since timestamptz := '-infinity';
    v_spent bigint;
    v_level smallint;
    v_reached smallint;
begin
    update public.rate_limit_usage set
        minute_ring = public.correct_ring(minute_ring, 7, v_then / 10000, v_ms / 10000, p_delta),
        hour_ring = public.correct_ring(hour_ring, 13, v_then / 300000, v_ms / 300000, p_delta),
        day_ring = public.correct_ring(day_ring, 25, v_then / 3600000, v_ms / 3600000, p_delta),
        plan_day_tokens = greatest(0, plan_day_tokens + case when plan_day = v_day or p_delta > 0 then p_delta else 0 end),
        plan_month_tokens = greatest(0, plan_month_tokens + case when plan_month = v_month or p_delta > 0 then p_delta else 0 end),
        slots = greatest(0, slots - v_released),
        test_slots = greatest(0, test_slots - case when p_record.environment = 'test' then v_released else 0 end)
    where subject = 'user' and subject_id = p_record.user_id;
    select k.budget_window, k.budget_nanos into v_window, v_budget from public.api_keys_new k where k.id = p_record.key_id;
    if v_window is not null then
        v_since := public.budget_start(v_window, p_now);
    end if;
    update public.rate_limit_usage set
        minute_ring = public.correct_ring(minute_ring, 7, v_then / 10000, v_ms / 10000, p_delta),
        hour_ring = public.correct_ring(hour_ring, 13, v_then / 300000, v_ms / 300000, p_delta),
        day_ring = public.correct_ring(day_ring, 25, v_then / 3600000, v_ms / 3600000, p_delta),
        slots = greatest(0, slots - v_released),
        budget_spent_nanos = greatest(0, case when budget_since < v_since then 0 else budget_spent_nanos end + p_cost),
        budget_level = case when budget_since < v_since then 0 else budget_level end,
        budget_since = greatest(budget_since, v_since),
        budget_held_nanos = greatest(0, budget_held_nanos - case when v_first then p_record.hold_nanos else 0 end)
    where subject = 'key' and subject_id = p_record.key_id
    returning budget_spent_nanos, budget_level into v_spent, v_level;
    if v_budget is not null and p_cost > 0 then
        v_reached := public.note_budget_level(p_record, null, v_budget, v_window, v_since, v_spent, p_cost, v_level);
        if v_reached <> v_level then
            update public.rate_limit_usage set budget_level = v_reached where subject = 'key' and subject_id = p_record.key_id;
        end if;
    end if;
    if p_record.has_end_user_budget then
        perform public.release_end_user(p_record, p_cost, p_now);
    end if;
end $$;

create function public.release_end_user(p_record public.usage_records, p_cost bigint, p_now timestamptz) returns void
language plpgsql as $$
declare
    v_budget public.end_user_budgets := public.end_user_budget(p_record.user_id, p_record.end_user);
    v_since timestamptz := public.budget_start(v_budget.budget_window, p_now);
    v_spent bigint;
    v_level smallint;
    v_reached smallint;
begin
    update public.end_user_usage set
        budget_spent_nanos = greatest(0, case when budget_since < v_since then 0 else budget_spent_nanos end + p_cost),
        budget_level = case when budget_since < v_since then 0 else budget_level end,
        budget_since = greatest(budget_since, v_since),
        budget_held_nanos = greatest(0, budget_held_nanos - case when p_record.status = 'pending' then p_record.hold_nanos else 0 end)
    where user_id = p_record.user_id and end_user = p_record.end_user
    returning budget_spent_nanos, budget_level into v_spent, v_level;
    if v_level is null or v_budget.id is null or p_cost <= 0 then
        return;
    end if;
    v_reached := public.note_budget_level(p_record, p_record.end_user, v_budget.budget_nanos, v_budget.budget_window, v_since, v_spent, p_cost,
                                          v_level);
    if v_reached <> v_level then
        update public.end_user_usage set budget_level = v_reached where user_id = p_record.user_id and end_user = p_record.end_user;
    end if;
end $$;
revoke all on function public.release_end_user(public.usage_records, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.release_end_user(public.usage_records, bigint, timestamptz) to service_role;
revoke all on function public.release_counters(public.usage_records, bigint, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.release_counters(public.usage_records, bigint, bigint, timestamptz) to service_role;

-- Raising a hold.

create type public.raise_item as (
    request_id uuid,
    fixed_nanos numeric,
    output_nanos numeric,
    min_output bigint,
    max_output bigint,
    price_basis jsonb
);
revoke all on type public.raise_item from public, anon, authenticated;
grant usage on type public.raise_item to service_role;

-- Decides anew for a running request, with its own hold as available as it was before. A hold never falls.
create function public.raise_one(p_item public.raise_item, p_locked bigint[]) returns jsonb
language plpgsql as $$
declare
    v_now timestamptz := clock_timestamp();
    v_record public.usage_records;
    v_user public.users;
    v_ask public.admission_item;
    v_available bigint;
    v_budget bigint;
    v_end_user_left bigint;
    v_granted bigint := p_item.max_output;
    v_hold bigint := 0;
begin
    select * into v_record from public.usage_records where request_id = p_item.request_id;
    if not found then
        return jsonb_build_object('outcome', 'unknown');
    elsif v_record.user_id <> all (p_locked) then
        return jsonb_build_object('outcome', 'busy');
    elsif v_record.status <> 'pending' then
        return jsonb_build_object('outcome', 'unknown');
    end if;
    select * into v_user from public.users where id = v_record.user_id;
    if v_record.environment <> 'test' and not v_record.byok then
        v_ask.fixed_nanos := p_item.fixed_nanos;
        v_ask.output_nanos := p_item.output_nanos;
        v_ask.min_output := p_item.min_output;
        v_ask.max_output := p_item.max_output;
        v_ask.markup := v_record.markup;
        v_available := v_user.credits_nanos - v_user.held_nanos + v_record.hold_nanos;
        select k.budget_nanos - u.budget_held_nanos + v_record.hold_nanos
               - case when u.budget_since < public.budget_start(k.budget_window, v_now) then 0 else u.budget_spent_nanos end into v_budget
        from public.api_keys_new k join public.rate_limit_usage u on u.subject = 'key' and u.subject_id = k.id where k.id = v_record.key_id;
        if v_record.has_end_user_budget then
            v_end_user_left := public.end_user_left(v_record.user_id, v_record.end_user, v_now) + v_record.hold_nanos;
        end if;
        v_granted := public.affordable_output(v_ask, greatest(0, least(v_available, v_budget, v_end_user_left)));
        if v_granted < p_item.min_output then
            return public.refuse_for_money(v_ask, v_user.credits_nanos, v_user.held_nanos - v_record.hold_nanos, v_available, v_budget,
                                           v_end_user_left, v_granted);
        end if;
        v_hold := greatest(v_record.hold_nanos, ceil((p_item.fixed_nanos + p_item.output_nanos * v_granted) * v_record.markup));
    end if;
    update public.usage_records set hold_nanos = v_hold, output_granted = v_granted, price_basis = coalesce(p_item.price_basis, price_basis)
    where request_id = v_record.request_id;
    if v_hold > v_record.hold_nanos then
        update public.users set held_nanos = held_nanos + v_hold - v_record.hold_nanos where id = v_user.id;
        update public.rate_limit_usage set budget_held_nanos = budget_held_nanos + v_hold - v_record.hold_nanos
        where subject = 'key' and subject_id = v_record.key_id;
        if v_record.has_end_user_budget then
            perform public.hold_for_end_user(v_user.id, v_record.end_user, v_hold - v_record.hold_nanos);
        end if;
    end if;
    return jsonb_build_object('outcome', 'raised', 'granted_output', v_granted, 'hold_nanos', v_hold, 'balance_nanos', v_user.credits_nanos);
end $$;
revoke all on function public.raise_one(public.raise_item, bigint[]) from public, anon, authenticated;
grant execute on function public.raise_one(public.raise_item, bigint[]) to service_role;

create function public.raise_holds(p_items jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_locked bigint[] := public.lock_users(public.settlement_users(p_items));
    v_raw jsonb;
    v_answer jsonb;
    v_answers jsonb[] := '{}';
begin
    for v_raw in select i from jsonb_array_elements(p_items) as i loop
        begin
            v_answer := public.raise_one(jsonb_populate_record(null::public.raise_item, v_raw), v_locked);
        exception when others then
            v_answer := jsonb_build_object('outcome', 'failed', 'sqlstate', sqlstate, 'message', sqlerrm);
        end;
        v_answers := v_answers || (v_answer || jsonb_build_object('request_id', v_raw -> 'request_id'));
    end loop;
    return to_jsonb(v_answers);
end $$;
comment on function public.raise_holds is
    'A larger hold for each item (raise_item), where a request goes out again at another price. Answers carry request_id and outcome: '
    'raised, credits, budget, end_user_budget, unknown (not running), busy or failed.';
revoke all on function public.raise_holds(jsonb) from public, anon, authenticated;
grant execute on function public.raise_holds(jsonb) to service_role;

-- Sums.


-- ============================================================================
-- management_again
-- ============================================================================

-- Management once more: limits in the answer to a verified key, wrong administrator's keys, a bound on keys, signup credits once per
-- address, tenants' audit logs without administrators' addresses, and built-in rows that stay.

-- p: action, address, address_subject, user_agent, request_id, limit. A secret that was presented and is wrong: one audit row per address
-- and minute with a count, and at most `limit` answers a minute. Outcomes: counted, limited (with retry_after).
create function public.note_wrong_secret(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_id bigint := hashtextextended('secret:' || (p ->> 'address_subject'), 0);
    v_now timestamptz := clock_timestamp();
    v_ring bigint[];
begin
    perform public.note_refusals(array[jsonb_build_object(
        'actor', 'address:' || (p ->> 'address_subject'), 'action', p ->> 'action', 'ip', p ->> 'address',
        'user_agent', left(p ->> 'user_agent', 512), 'request_id', p ->> 'request_id')]);
    insert into public.rate_limit_usage (subject, subject_id) values ('address', v_id) on conflict do nothing;
    select public.advance_ring(u.minute_ring, 7, (extract(epoch from v_now) * 1000)::bigint / 10000) into v_ring
    from public.rate_limit_usage u where u.subject = 'address' and u.subject_id = v_id for no key update;
    if v_ring[15] >= (p ->> 'limit')::bigint then
        return jsonb_build_object('outcome', 'limited', 'retry_after', public.retry_after_seconds(
            public.ring_frees_at(v_ring, 7, 10000, 0, v_ring[15] + 1 - (p ->> 'limit')::bigint), v_now));
    end if;
    update public.rate_limit_usage u set minute_ring = public.count_in_ring(v_ring, 7, null, 1, 0), last_used_at = v_now
    where u.subject = 'address' and u.subject_id = v_id;
    return jsonb_build_object('outcome', 'counted');
end $$;
comment on function public.note_wrong_secret is
    'Of an address''s guesses; whether a right secret is let in is never asked here, so that nobody can lock the operator out.';
revoke all on function public.note_wrong_secret(jsonb) from public, anon, authenticated;
grant execute on function public.note_wrong_secret(jsonb) to service_role;

-- Which email addresses have had their signup credits, as HMACs: deleting an account and registering again earns no second ones.
create table public.signup_claims (
    email_hash text primary key check (email_hash ~ '^[0-9a-f]{64}$'),
    claimed_at timestamptz not null default clock_timestamp()
);
comment on table public.signup_claims is 'HMACs of email addresses, under KEY_HASH_SECRETS: nobody without the secret can tell whose they are.';
alter table public.signup_claims enable row level security;
revoke all on public.signup_claims from public, anon, authenticated, service_role;
grant select, insert on public.signup_claims to service_role;

create function public.claim_signup(p jsonb) returns void language sql set search_path = '' as $$
    insert into public.signup_claims (email_hash)
    select p -> 'email_hashes' ->> 0 where p -> 'email_hashes' ->> 0 is not null on conflict do nothing
$$;
revoke all on function public.claim_signup(jsonb) from public, anon, authenticated;
grant execute on function public.claim_signup(jsonb) to service_role;

-- A page of a user's own audit log, newest first. What somebody else did to the account shows that, and not from where.
create function public.list_own_audit(
    p_user_id bigint, p_key_id bigint, p_action text, p_start timestamptz, p_end timestamptz, p_before bigint, p_limit int
) returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(to_jsonb(l) order by l.id desc), '[]') from (
        select a.id, case when o.own then a.actor else 'admin' end as actor, a.action, a.target, a.user_id, a.key_id,
               case when o.own then host(a.ip) end as ip, case when o.own then a.user_agent end as user_agent,
               a.request_id, a.details, a.occurrences, a.created_at
        from public.audit_logs a, lateral (
            select a.actor in ('gateway', 'user:' || p_user_id) or exists (
                select from public.api_keys_new k where k.user_id = p_user_id and a.actor = 'key:' || k.id) as own) as o
        where a.user_id = p_user_id and (p_key_id is null or a.key_id = p_key_id) and (p_action is null or a.action = p_action)
          and (p_start is null or a.created_at >= p_start) and (p_end is null or a.created_at < p_end)
          and (p_before is null or a.id < p_before)
        order by a.id desc limit p_limit) as l
$$;
revoke all on function public.list_own_audit(bigint, bigint, text, timestamptz, timestamptz, bigint, int) from public, anon, authenticated;
grant execute on function public.list_own_audit(bigint, bigint, text, timestamptz, timestamptz, bigint, int) to service_role;

-- The rows that apply to everybody who has none of their own: without them nothing would be limited.
create function public.refuse_built_in_change() returns trigger language plpgsql set search_path = '' as $$
begin
    raise exception '% of a built-in row of % is refused: it applies to everybody without one of their own', lower(tg_op), tg_table_name
        using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_built_in_change() from public, anon, authenticated;
grant execute on function public.refuse_built_in_change() to service_role;

insert into public.plans (slug, name, description, daily_request_limit, monthly_request_limit, daily_token_limit, monthly_token_limit)
values ('free', 'Free', 'What an account without a plan and without bought or granted credits may use.', 100, 1000, 10000, 100000),
       ('pay-as-you-go', 'Pay as you go', 'Prepaid credits without a plan: rate limits only.', null, null, null, null)
on conflict (slug) do nothing;
insert into public.rate_limit_configs (subject, subject_id, requests_per_minute, requests_per_hour, requests_per_day,
                                       tokens_per_minute, tokens_per_hour, tokens_per_day)
values ('default', 0, 60, 1000, 10000, 10000, 100000, 1000000)
on conflict do nothing;
create trigger plans_built_in_stay before delete on public.plans
    for each row when (old.slug in ('free', 'pay-as-you-go')) execute function public.refuse_built_in_change();
create trigger plans_built_in_keep_their_slug before update of slug, is_active on public.plans
    for each row when (old.slug in ('free', 'pay-as-you-go') and (new.slug <> old.slug or not new.is_active))
    execute function public.refuse_built_in_change();
create trigger plans_no_truncate before truncate on public.plans for each statement execute function public.refuse_built_in_change();
create trigger rate_limit_configs_default_stays before delete on public.rate_limit_configs
    for each row when (old.subject = 'default') execute function public.refuse_built_in_change();
create trigger rate_limit_configs_default_keeps_its_name before update of subject, subject_id on public.rate_limit_configs
    for each row when (old.subject = 'default' and (new.subject, new.subject_id) <> (old.subject, old.subject_id))
    execute function public.refuse_built_in_change();
create trigger rate_limit_configs_no_truncate before truncate on public.rate_limit_configs
    for each statement execute function public.refuse_built_in_change();

-- p: user_id, plan_id, duration_months, actor, ... Outcomes: assigned, not_found, plan_not_found. Months are the calendar's, in UTC.
create function public.assign_plan_at(p jsonb, p_now timestamptz) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_plan public.plans;
    v_end timestamptz := (p_now at time zone 'UTC' + make_interval(months => (p ->> 'duration_months')::int)) at time zone 'UTC';
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    select * into v_plan from public.plans where id = (p ->> 'plan_id')::bigint and is_active;
    if not found then
        return jsonb_build_object('outcome', 'plan_not_found');
    end if;
    update public.user_plans set is_active = false, end_date = greatest(least(end_date, p_now), start_date + interval '1 microsecond')
    where user_id = v_user.id and is_active;
    insert into public.user_plans (user_id, plan_id, start_date, end_date) values (v_user.id, v_plan.id, p_now, v_end);
    perform public.activate_subscription(v_user.id, false);
    perform public.write_audit(p ->> 'actor', 'assign_plan', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, jsonb_build_object('plan_id', v_plan.id, 'until', v_end));
    return jsonb_build_object('outcome', 'assigned', 'user_id', v_user.id, 'plan_id', v_plan.id, 'plan_name', v_plan.name, 'end_date', v_end);
end $$;
revoke all on function public.assign_plan_at(jsonb, timestamptz) from public, anon, authenticated;
grant execute on function public.assign_plan_at(jsonb, timestamptz) to service_role;


-- ============================================================================
-- spending
-- ============================================================================

-- The surface around the proxy: what a key, an account and a request look like from outside, what a request would be granted, users' own
-- upstream keys, budgets of their customers, webhooks and their deliveries, and our books beside the upstream's.

create index usage_records_byok_idx on public.usage_records (key_id, created_at) where byok;
comment on index public.usage_records_byok_idx is
    'What was sent with users'' own keys is summed up nowhere else. It mentions only what admission writes once, so updates stay heap-only.';

-- A replaced secret signs beside its successor for a while, so that a receiver need not change both at once.
alter table public.webhooks
    add column previous_encrypted_secret text check (length(previous_encrypted_secret) <= 2000),
    add column previous_valid_until timestamptz,
    add column disabled_reason text check (length(disabled_reason) <= 500),
    add constraint webhooks_previous_has_end check ((previous_encrypted_secret is null) = (previous_valid_until is null));
comment on column public.webhooks.disabled_reason is 'Why the gateway switched it off (410 Gone); null when the user did.';

-- A delivery without an event is a test.
alter table public.webhook_deliveries alter column event_id drop not null;
create index webhook_deliveries_webhook_idx on public.webhook_deliveries (webhook_id, id desc);
create index webhook_deliveries_event_idx on public.webhook_deliveries (event_id);

-- What stays open in the books: requests that were settled without a known cost, and those that cost more than was held. Noted off the
-- hot path, when their part of the journal is closed; what is not closed is looked at as it stands.
create table public.open_items (
    request_id uuid primary key references public.usage_records (request_id),
    noted_at timestamptz not null default clock_timestamp()
);
comment on table public.open_items is 'Settled requests without a known cost, or above their hold. Ids are UUIDv7: they sort by time.';
alter table public.open_items enable row level security;
revoke all on public.open_items from public, anon, authenticated, service_role;
grant select, insert on public.open_items to service_role;
create table public.open_items_state (
    singleton boolean primary key default true check (singleton),
    noted_until timestamptz not null default '-infinity'
);
comment on table public.open_items_state is 'One row: the journal before noted_until has been looked through.';
insert into public.open_items_state default values;
alter table public.open_items_state enable row level security;
revoke all on public.open_items_state from public, anon, authenticated, service_role;
grant select, insert, update on public.open_items_state to service_role;

-- A key, an account and a request, as their owner sees them.

-- What a key has been charged, in all and in the UTC day, week and month, and what its requests cost that were sent with the user's own key.
create function public.key_usage(p_user_id bigint, p_key_id bigint) returns jsonb language sql stable set search_path = '' as $$
    with starts as (
        select date_trunc('day', t)::date as today, date_trunc('week', t)::date as week, date_trunc('month', t)::date as month
        from (select now() at time zone 'UTC' as t) as n
    ), days as (
        select d.day, d.cost_nanos from public.usage_days d where d.user_id = p_user_id and d.key_id = p_key_id
        union all
        select (s.slot at time zone 'UTC')::date, s.cost_nanos
        from public.count_usage(p_user_id, (select summed_until from public.usage_sums_state), 'infinity') s where s.key_id = p_key_id
    ), own as (
        select (r.created_at at time zone 'UTC')::date as day, coalesce(r.upstream_cost_nanos, 0) as cost_nanos
        from public.usage_records r where r.key_id = p_key_id and r.byok
    )
    select jsonb_build_object(
        'usage_nanos', coalesce(sum(a.charged), 0), 'usage_daily_nanos', coalesce(sum(a.charged) filter (where a.day >= s.today), 0),
        'usage_weekly_nanos', coalesce(sum(a.charged) filter (where a.day >= s.week), 0),
        'usage_monthly_nanos', coalesce(sum(a.charged) filter (where a.day >= s.month), 0),
        'byok_usage_nanos', coalesce(sum(a.own), 0), 'byok_usage_daily_nanos', coalesce(sum(a.own) filter (where a.day >= s.today), 0),
        'byok_usage_weekly_nanos', coalesce(sum(a.own) filter (where a.day >= s.week), 0),
        'byok_usage_monthly_nanos', coalesce(sum(a.own) filter (where a.day >= s.month), 0))
    from starts s left join (
        select d.day, d.cost_nanos as charged, 0 as own from days d union all select o.day, 0, o.cost_nanos from own o) as a on true
$$;
revoke all on function public.key_usage(bigint, bigint) from public, anon, authenticated;
grant execute on function public.key_usage(bigint, bigint) to service_role;

-- A key with what it has used, its tightest limit on requests, and whether its account is on the free plan; null for somebody else's.
create function public.read_key(p_user_id bigint, p_key_id bigint) returns jsonb language sql stable set search_path = '' as $$
    select public.key_view(k) || public.key_usage(p_user_id, p_key_id) || jsonb_build_object(
        'budget_held_nanos', coalesce((select g.budget_held_nanos from public.rate_limit_usage g
                                       where g.subject = 'key' and g.subject_id = k.id), 0),
        'requests_per_minute', (
            select min(c.requests_per_minute) from public.rate_limit_configs c
            where (c.subject, c.subject_id) in (('key', k.id), ('user', u.id))
               or (c.subject = 'default' and not exists (select from public.rate_limit_configs o
                                                         where o.subject = 'user' and o.subject_id = u.id))),
        'is_free_tier', (select p.slug = 'free' from public.current_plan(u, now()) as p))
    from public.api_keys_new k join public.users u on u.id = k.user_id
    where k.id = p_key_id and k.user_id = p_user_id and k.revoked_at is null
$$;
revoke all on function public.read_key(bigint, bigint) from public, anon, authenticated;
grant execute on function public.read_key(bigint, bigint) to service_role;

-- What an account was given in all, and its balance, of one moment. Refunds are no gift: they take back what was charged.
create function public.read_credits(p_user_id bigint) returns jsonb language sql stable set search_path = '' as $$
    select jsonb_build_object('balance_nanos', u.credits_nanos, 'granted_nanos', coalesce((
        select sum(t.amount_nanos) from public.credit_transactions t where t.user_id = u.id and t.kind <> 'refund'), 0))
    from public.users u where u.id = p_user_id
$$;
revoke all on function public.read_credits(bigint) from public, anon, authenticated;
grant execute on function public.read_credits(bigint) to service_role;

-- A request of this user with the refunds of it, or null.
create function public.read_receipt(p_user_id bigint, p_request_id uuid) returns jsonb language sql stable set search_path = '' as $$
    -- The markup as text: as a JSON number it would be read as a float.
    select to_jsonb(r) || jsonb_build_object('markup', r.markup::text, 'refunds', (
        select coalesce(jsonb_agg(jsonb_build_object('transaction_id', t.id, 'amount_nanos', t.amount_nanos, 'reason', t.reason,
                                                     'balance_after_nanos', t.balance_after_nanos, 'created_at', t.created_at)
                                  order by t.id), '[]')
        from public.credit_transactions t where t.request_id = r.request_id))
    from public.usage_records r where r.request_id = p_request_id and r.user_id = p_user_id
$$;
revoke all on function public.read_receipt(bigint, uuid) from public, anon, authenticated;
grant execute on function public.read_receipt(bigint, uuid) to service_role;

-- A user's newest request with this generation id, or null. No index may hold what settlement writes, so it is looked for among what the
-- user asked for around p_around (a minute, then a quarter of an hour either way), or, where the id names no time, in the last day: at
-- most 50,000 requests each time.
create function public.find_generation(p_user_id bigint, p_generation_id text, p_around timestamptz) returns jsonb
language plpgsql stable set search_path = '' as $$
declare
    v_width interval;
    v_found jsonb;
begin
    foreach v_width in array case when p_around is null then array[interval '1 day'] else array[interval '1 minute', interval '15 minutes'] end
    loop
        select to_jsonb(r) into v_found from (
            select * from public.usage_records n
            where n.user_id = p_user_id and n.created_at >= coalesce(p_around, clock_timestamp()) - v_width
              and n.created_at <= coalesce(p_around, clock_timestamp()) + v_width
            order by n.created_at desc limit 50000) as r
        where r.generation_id = p_generation_id order by r.created_at desc limit 1;
        exit when v_found is not null;
    end loop;
    return v_found;
end $$;
revoke all on function public.find_generation(bigint, text, timestamptz) from public, anon, authenticated;
grant execute on function public.find_generation(bigint, text, timestamptz) to service_role;

-- As before, and since when the budget is there.
create function public.end_user_standing(p_user_id bigint, p_end_user text, p_now timestamptz) returns jsonb
language sql stable set search_path = '' as $$
    select jsonb_build_object(
        'end_user', p_end_user, 'budget_id', b.id, 'budget_end_user', b.end_user, 'budget_nanos', b.budget_nanos,
        'budget_window', b.budget_window, 'window_start', nullif(public.budget_start(b.budget_window, p_now), '-infinity'),
        'spent_nanos', case when u.budget_since >= public.budget_start(b.budget_window, p_now) then u.budget_spent_nanos else 0 end,
        'held_nanos', coalesce(u.budget_held_nanos, 0), 'created_at', b.created_at, 'updated_at', b.updated_at)
    from public.end_user_budgets b
    left join public.end_user_usage u on u.user_id = p_user_id and u.end_user = p_end_user
    where b.user_id = p_user_id and b.end_user in (p_end_user, '*')
    order by b.end_user = p_end_user desc limit 1
$$;
revoke all on function public.end_user_standing(bigint, text, timestamptz) from public, anon, authenticated;
grant execute on function public.end_user_standing(bigint, text, timestamptz) to service_role;

-- What admission would say to this request now, as far as money and the lasting rules go; nothing is counted, held or locked.
-- p: user_id, key_id, models, end_user, and the amounts of an admission_item. Rate limits are not looked at: they are gone in a moment.
-- Outcomes: granted, credits, budget, end_user_budget, MODEL_NOT_ALLOWED, REQUEST_LIMIT_EXCEEDED, trial_expired, not_found.
create function public.quote_request(p jsonb) returns jsonb language plpgsql stable set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_item public.admission_item := jsonb_populate_record(null::public.admission_item, p - 'user_id' - 'key_id');
    v_user public.users;
    v_key public.api_keys_new;
    v_plan public.plans;
    v_usage public.rate_limit_usage;
    v_available bigint;
    v_budget bigint;
    v_end_user jsonb;
    v_end_user_left bigint;
    v_least bigint;
    v_granted bigint;
    v_byok boolean;
begin
    select * into v_user from public.users where id = (p ->> 'user_id')::bigint;
    select * into v_key from public.api_keys_new where id = (p ->> 'key_id')::bigint and user_id = v_user.id;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_plan := public.current_plan(v_user, v_now);
    select * into v_usage from public.rate_limit_usage where subject = 'key' and subject_id = v_key.id;
    v_usage := public.advance_usage(v_usage, v_now, v_key.budget_window);
    v_byok := exists (select from public.provider_keys k where k.user_id = v_user.id and k.is_active);
    if not public.models_allowed(v_key.allowed_models, v_item.models) or not public.models_allowed(v_plan.allowed_models, v_item.models) then
        return jsonb_build_object('outcome', 'MODEL_NOT_ALLOWED');
    elsif v_usage.requests_used >= v_key.max_requests then
        return jsonb_build_object('outcome', 'REQUEST_LIMIT_EXCEEDED');
    elsif v_key.environment_tag = 'test' then
        return jsonb_build_object('outcome', 'granted', 'granted_output', v_item.max_output, 'hold_nanos', 0, 'byok', false, 'free', true);
    elsif v_user.subscription_status = 'trial' and v_user.trial_expires_at <= v_now then
        return jsonb_build_object('outcome', 'trial_expired');
    elsif v_byok then
        return jsonb_build_object('outcome', 'granted', 'granted_output', v_item.max_output, 'hold_nanos', 0, 'byok', true, 'free', false);
    end if;
    v_available := v_user.credits_nanos - v_user.held_nanos;
    v_budget := v_key.budget_nanos - coalesce(v_usage.budget_spent_nanos + v_usage.budget_held_nanos, 0);
    v_end_user := public.end_user_standing(v_user.id, p ->> 'end_user', v_now);
    v_end_user_left := (v_end_user ->> 'budget_nanos')::bigint - (v_end_user ->> 'spent_nanos')::bigint - (v_end_user ->> 'held_nanos')::bigint;
    v_least := greatest(0, least(v_available, v_budget, v_end_user_left));
    v_granted := public.affordable_output(v_item, v_least);
    return jsonb_build_object(
        'outcome', case when v_granted >= v_item.min_output then 'granted' when v_end_user_left < least(v_available, v_budget) then 'end_user_budget'
                        when v_budget < v_available then 'budget' else 'credits' end,
        'granted_output', greatest(0, v_granted), 'available_nanos', v_least, 'byok', false, 'free', false,
        'hold_nanos', ceil((v_item.fixed_nanos + v_item.output_nanos * greatest(v_granted, v_item.min_output)) * v_item.markup));
end $$;
revoke all on function public.quote_request(jsonb) from public, anon, authenticated;
grant execute on function public.quote_request(jsonb) to service_role;

-- Users' own upstream keys. Orders hold user_id, maker_id and the stamp of whoever acts.

-- Of a URL only where it leads to: path and query often are a secret, and the log is for ever.
create function public.audit_order(p jsonb, p_action text, p_target text, p_user_id bigint, p_details jsonb) returns void
language sql set search_path = '' as $$
    select public.write_audit(
        p ->> 'actor', p_action, p_target, p_user_id, (p ->> 'maker_id')::bigint, p ->> 'address', p ->> 'user_agent',
        (p ->> 'request_id')::uuid,
        case when p_details ? 'url' then jsonb_set(p_details, '{url}', to_jsonb(substring(p_details ->> 'url' from '^https://[^/?#]*')))
             else p_details end)
$$;
revoke all on function public.audit_order(jsonb, text, text, bigint, jsonb) from public, anon, authenticated;
grant execute on function public.audit_order(jsonb, text, text, bigint, jsonb) to service_role;

-- The user who gives an order, locked; null where the account or the key that acts has gone since it was verified.
create function public.lock_orderer(p jsonb) returns bigint language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
begin
    return case when v_maker.user_id = v_user.id then v_user.id end;
end $$;
revoke all on function public.lock_orderer(jsonb) from public, anon, authenticated;
grant execute on function public.lock_orderer(jsonb) to service_role;

-- p: encrypted_key, label. Outcomes: set, not_found.
create function public.set_provider_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_key public.provider_keys;
begin
    if v_user_id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    insert into public.provider_keys as k (user_id, encrypted_key, label) values (v_user_id, p ->> 'encrypted_key', p ->> 'label')
    on conflict (user_id) do update set encrypted_key = excluded.encrypted_key, label = excluded.label, is_active = true,
                                        updated_at = clock_timestamp()
    returning * into v_key;
    perform public.audit_order(p, 'set_provider_key', 'user:' || v_user_id, v_user_id, jsonb_build_object('label', v_key.label));
    return jsonb_build_object('outcome', 'set', 'label', v_key.label, 'is_active', v_key.is_active, 'created_at', v_key.created_at,
                              'updated_at', v_key.updated_at);
end $$;
revoke all on function public.set_provider_key(jsonb) from public, anon, authenticated;
grant execute on function public.set_provider_key(jsonb) to service_role;

-- Outcomes: deleted, not_found.
create function public.delete_provider_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_label text;
begin
    delete from public.provider_keys where user_id = v_user_id returning label into v_label;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(p, 'delete_provider_key', 'user:' || v_user_id, v_user_id, jsonb_build_object('label', v_label));
    return jsonb_build_object('outcome', 'deleted');
end $$;
revoke all on function public.delete_provider_key(jsonb) from public, anon, authenticated;
grant execute on function public.delete_provider_key(jsonb) to service_role;

-- Budgets of a user's customers.

-- The budgets, newest first, each with how its end user stands now; that of '*' is each one's own, so it shows nothing spent.
create function public.list_end_user_budgets(p_user_id bigint, p_before bigint, p_limit int) returns jsonb
language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(public.end_user_standing(p_user_id, b.end_user, now())
                              || jsonb_build_object('created_at', b.created_at, 'updated_at', b.updated_at) order by b.id desc), '[]')
    from (select * from public.end_user_budgets n where n.user_id = p_user_id and (p_before is null or n.id < p_before)
          order by n.id desc limit p_limit) as b
$$;
revoke all on function public.list_end_user_budgets(bigint, bigint, int) from public, anon, authenticated;
grant execute on function public.list_end_user_budgets(bigint, bigint, int) to service_role;

-- p: end_user, budget_nanos, budget_window. Outcomes: created, name_taken, too_many, not_found.
create function public.create_end_user_budget(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_budget public.end_user_budgets;
begin
    if v_user_id is null then
        return jsonb_build_object('outcome', 'not_found');
    elsif exists (select from public.end_user_budgets b where b.user_id = v_user_id and b.end_user = p ->> 'end_user') then
        return jsonb_build_object('outcome', 'name_taken');
    elsif (select count(*) from public.end_user_budgets b where b.user_id = v_user_id) >= 10000 then
        return jsonb_build_object('outcome', 'too_many');
    end if;
    insert into public.end_user_budgets (user_id, end_user, budget_nanos, budget_window)
    values (v_user_id, p ->> 'end_user', (p ->> 'budget_nanos')::bigint, p ->> 'budget_window') returning * into v_budget;
    perform public.audit_order(p, 'create_end_user_budget', 'end_user_budget:' || v_budget.id, v_user_id, to_jsonb(v_budget) - 'user_id');
    return public.end_user_standing(v_user_id, v_budget.end_user, clock_timestamp())
        || jsonb_build_object('outcome', 'created', 'created_at', v_budget.created_at, 'updated_at', v_budget.updated_at);
end $$;
revoke all on function public.create_end_user_budget(jsonb) from public, anon, authenticated;
grant execute on function public.create_end_user_budget(jsonb) to service_role;

-- p: budget_id, changes {budget_nanos, budget_window}. Outcomes: updated, not_found.
create function public.update_end_user_budget(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_budget public.end_user_budgets;
begin
    update public.end_user_budgets b set
        budget_nanos = coalesce((p -> 'changes' ->> 'budget_nanos')::bigint, b.budget_nanos),
        budget_window = coalesce(p -> 'changes' ->> 'budget_window', b.budget_window), updated_at = clock_timestamp()
    where b.id = (p ->> 'budget_id')::bigint and b.user_id = v_user_id returning * into v_budget;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(p, 'update_end_user_budget', 'end_user_budget:' || v_budget.id, v_user_id, to_jsonb(v_budget) - 'user_id');
    return public.end_user_standing(v_user_id, v_budget.end_user, clock_timestamp())
        || jsonb_build_object('outcome', 'updated', 'created_at', v_budget.created_at, 'updated_at', v_budget.updated_at);
end $$;
revoke all on function public.update_end_user_budget(jsonb) from public, anon, authenticated;
grant execute on function public.update_end_user_budget(jsonb) to service_role;

-- p: budget_id. Outcomes: deleted, not_found.
create function public.delete_end_user_budget(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_budget public.end_user_budgets;
begin
    delete from public.end_user_budgets b where b.id = (p ->> 'budget_id')::bigint and b.user_id = v_user_id returning * into v_budget;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(p, 'delete_end_user_budget', 'end_user_budget:' || v_budget.id, v_user_id,
                               jsonb_build_object('end_user', v_budget.end_user));
    return jsonb_build_object('outcome', 'deleted');
end $$;
revoke all on function public.delete_end_user_budget(jsonb) from public, anon, authenticated;
grant execute on function public.delete_end_user_budget(jsonb) to service_role;

-- Webhooks, and the deliveries of them.

create function public.webhook_view(p_webhook public.webhooks) returns jsonb language sql stable set search_path = '' as $$
    select to_jsonb(p_webhook) - 'user_id' - 'encrypted_secret' - 'previous_encrypted_secret'
$$;
revoke all on function public.webhook_view(public.webhooks) from public, anon, authenticated;
grant execute on function public.webhook_view(public.webhooks) to service_role;

-- p: url, encrypted_secret. Outcomes: created, too_many, not_found.
create function public.create_webhook(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_webhook public.webhooks;
begin
    if v_user_id is null then
        return jsonb_build_object('outcome', 'not_found');
    elsif (select count(*) from public.webhooks w where w.user_id = v_user_id) >= 5 then
        return jsonb_build_object('outcome', 'too_many');
    end if;
    insert into public.webhooks (user_id, url, encrypted_secret) values (v_user_id, p ->> 'url', p ->> 'encrypted_secret')
    returning * into v_webhook;
    perform public.audit_order(p, 'create_webhook', 'webhook:' || v_webhook.id, v_user_id, jsonb_build_object('url', v_webhook.url));
    return public.webhook_view(v_webhook) || jsonb_build_object('outcome', 'created');
end $$;
revoke all on function public.create_webhook(jsonb) from public, anon, authenticated;
grant execute on function public.create_webhook(jsonb) to service_role;

-- p: webhook_id, changes {url, is_active, encrypted_secret}; a replaced secret signs for grace_seconds more. Outcomes: updated, not_found.
create function public.update_webhook(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_changes jsonb := p -> 'changes';
    v_now timestamptz := clock_timestamp();
    v_rotates boolean := v_changes ? 'encrypted_secret';
    v_webhook public.webhooks;
begin
    update public.webhooks w set
        url = coalesce(v_changes ->> 'url', w.url),
        is_active = coalesce((v_changes ->> 'is_active')::boolean, w.is_active),
        disabled_reason = case when v_changes ? 'is_active' then null else w.disabled_reason end,
        encrypted_secret = coalesce(v_changes ->> 'encrypted_secret', w.encrypted_secret),
        previous_encrypted_secret = case when v_rotates then w.encrypted_secret else w.previous_encrypted_secret end,
        previous_valid_until = case when v_rotates then v_now + make_interval(secs => (p ->> 'grace_seconds')::int)
                                    else w.previous_valid_until end,
        updated_at = v_now
    where w.id = (p ->> 'webhook_id')::bigint and w.user_id = v_user_id returning * into v_webhook;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(p, 'update_webhook', 'webhook:' || v_webhook.id, v_user_id, jsonb_build_object(
        'fields', (select jsonb_agg(case f when 'encrypted_secret' then 'secret' else f end) from jsonb_object_keys(v_changes) as f),
        'url', v_webhook.url));
    return public.webhook_view(v_webhook) || jsonb_build_object('outcome', 'updated');
end $$;
revoke all on function public.update_webhook(jsonb) from public, anon, authenticated;
grant execute on function public.update_webhook(jsonb) to service_role;

-- p: webhook_id. Its deliveries go with it. Outcomes: deleted, not_found.
create function public.delete_webhook(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_url text;
begin
    delete from public.webhooks w where w.id = (p ->> 'webhook_id')::bigint and w.user_id = v_user_id returning w.url into v_url;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(p, 'delete_webhook', 'webhook:' || (p ->> 'webhook_id'), v_user_id, jsonb_build_object('url', v_url));
    return jsonb_build_object('outcome', 'deleted');
end $$;
revoke all on function public.delete_webhook(jsonb) from public, anon, authenticated;
grant execute on function public.delete_webhook(jsonb) to service_role;

-- p: webhook_id. One test a minute of each. Outcomes: queued, too_soon, inactive, not_found.
create function public.queue_webhook_test(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_webhook public.webhooks;
    v_last timestamptz;
    v_id bigint;
begin
    select * into v_webhook from public.webhooks w where w.id = (p ->> 'webhook_id')::bigint and w.user_id = v_user_id;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    elsif not v_webhook.is_active then
        return jsonb_build_object('outcome', 'inactive');
    end if;
    select max(d.created_at) into v_last from public.webhook_deliveries d
    where d.webhook_id = v_webhook.id and d.event_id is null and d.created_at > clock_timestamp() - interval '1 minute';
    if v_last is not null then
        return jsonb_build_object('outcome', 'too_soon', 'retry_after',
                                  ceil(extract(epoch from v_last + interval '1 minute' - clock_timestamp()))::int);
    end if;
    insert into public.webhook_deliveries (webhook_id, user_id) values (v_webhook.id, v_user_id) returning id into v_id;
    return jsonb_build_object('outcome', 'queued', 'delivery_id', v_id);
end $$;
revoke all on function public.queue_webhook_test(jsonb) from public, anon, authenticated;
grant execute on function public.queue_webhook_test(jsonb) to service_role;

-- Deliveries that are due (or just one of them), for whoever asked first: nobody else gets them before the lease ends, and only a crash
-- lets it end. What is due for a webhook that is switched off has failed.
create function public.claim_deliveries(p_limit int, p_lease_seconds int, p_delivery_id bigint) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_claimed jsonb;
begin
    update public.webhook_deliveries d set failed_at = v_now, last_error = 'the webhook is switched off'
    where d.id in (
        select n.id from public.webhook_deliveries n join public.webhooks w on w.id = n.webhook_id
        where n.delivered_at is null and n.failed_at is null and n.next_attempt_at <= v_now and not w.is_active
        limit 1000 for update of n skip locked);
    -- The first of each webhook before the second of any: one that never answers must not keep the others waiting.
    with ranked as (
        select n.id, row_number() over (partition by n.webhook_id order by n.next_attempt_at, n.id) as place
        from public.webhook_deliveries n
        where n.delivered_at is null and n.failed_at is null and n.next_attempt_at <= v_now and (p_delivery_id is null or n.id = p_delivery_id)
    ), due as (
        select d.id from public.webhook_deliveries d join ranked r on r.id = d.id
        where d.delivered_at is null and d.failed_at is null and d.next_attempt_at <= v_now
        order by r.place, d.next_attempt_at limit p_limit for update of d skip locked
    ), claimed as (
        update public.webhook_deliveries d set attempts = d.attempts + 1, next_attempt_at = v_now + make_interval(secs => p_lease_seconds)
        from due where d.id = due.id returning d.*
    )
    select coalesce(jsonb_agg(jsonb_build_object(
        'id', c.id, 'attempts', c.attempts, 'created_at', c.created_at, 'webhook_id', w.id, 'url', w.url,
        'encrypted_secret', w.encrypted_secret,
        'previous_encrypted_secret', case when w.previous_valid_until > v_now then w.previous_encrypted_secret end,
        'event', case when e.id is not null then to_jsonb(e) end) order by c.id), '[]') into v_claimed
    from claimed c join public.webhooks w on w.id = c.webhook_id left join public.budget_events e on e.id = c.event_id;
    return v_claimed;
end $$;
revoke all on function public.claim_deliveries(int, int, bigint) from public, anon, authenticated;
grant execute on function public.claim_deliveries(int, int, bigint) to service_role;

-- p: id, attempt, status, error, delivered, gone (the receiver wants no more: the webhook is switched off), retry_seconds (null: it was the
-- last attempt). Outcomes: finished, stale (the lease ended and somebody else has it).
create function public.finish_delivery(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_retry int := (p ->> 'retry_seconds')::int;
    v_delivered boolean := (p ->> 'delivered')::boolean;
    v_gone boolean := (p ->> 'gone')::boolean;
    v_webhook_id bigint;
begin
    if v_gone then -- which changes the webhook too: first the user, as everybody does
        perform from public.users u
        where u.id = (select d.user_id from public.webhook_deliveries d where d.id = (p ->> 'id')::bigint) for no key update;
    end if;
    update public.webhook_deliveries d set
        delivered_at = case when v_delivered then v_now end,
        failed_at = case when not v_delivered and (v_gone or v_retry is null) then v_now end,
        next_attempt_at = case when v_delivered or v_retry is null then d.next_attempt_at else v_now + make_interval(secs => v_retry) end,
        last_status = (p ->> 'status')::int, last_error = left(p ->> 'error', 500)
    where d.id = (p ->> 'id')::bigint and d.attempts = (p ->> 'attempt')::int and d.delivered_at is null and d.failed_at is null
    returning d.webhook_id into v_webhook_id;
    if not found then
        return jsonb_build_object('outcome', 'stale');
    end if;
    if v_gone then
        update public.webhooks w set is_active = false, disabled_reason = 'the receiver answered 410 Gone', updated_at = v_now
        where w.id = v_webhook_id and w.is_active;
    end if;
    return jsonb_build_object('outcome', 'finished');
end $$;
revoke all on function public.finish_delivery(jsonb) from public, anon, authenticated;
grant execute on function public.finish_delivery(jsonb) to service_role;

-- Our books beside the upstream's.

-- What live requests that were admitted since p_start have cost, as far as they are settled: test requests, play money and requests with
-- users' own keys are not the operator's bill.
create function public.live_costs(p_start timestamptz) returns jsonb language sql stable set search_path = '' as $$
    with bounds as (
        select g.mode, g.live_from, s.summed_until,
               date_bin('15 minutes', g.live_from + interval '15 minutes' - interval '1 microsecond', '2000-01-01 00:00:00+00') as whole_from
        from (select mode, case when mode = 'live' then greatest(p_start, mode_since) else p_start end as live_from
              from public.gateway_state) as g, public.usage_sums_state s
    ), parts as (
        select t.requests, t.upstream_cost_nanos, t.cost_nanos, t.overrun_nanos
        from public.usage_totals t, bounds b
        where t.slot >= b.whole_from and t.slot < b.summed_until and t.environment <> 'test'
        union all -- what stands in those sums and is not the operator's bill (of its upstream cost they know nothing)
        select -1, 0, -r.cost_nanos, -r.overrun_nanos
        from public.usage_records r, bounds b
        where r.byok and r.created_at >= b.whole_from and r.created_at < b.summed_until and r.status <> 'pending' and r.environment <> 'test'
        union all -- the rest of a quarter of an hour in which the database went live, and what is not summed up yet
        select 1, coalesce(r.upstream_cost_nanos, 0), r.cost_nanos, r.overrun_nanos
        from public.usage_records r, bounds b
        where (r.created_at >= b.live_from and r.created_at < least(b.whole_from, b.summed_until)
               or r.created_at >= greatest(b.live_from, b.summed_until))
          and r.mode = b.mode and r.status <> 'pending' and r.environment <> 'test' and not r.byok
    )
    select jsonb_build_object('start', p_start, 'requests', coalesce(sum(requests), 0), 'upstream_cost_nanos', coalesce(sum(upstream_cost_nanos), 0),
                              'charged_nanos', coalesce(sum(cost_nanos), 0), 'overrun_nanos', coalesce(sum(overrun_nanos), 0))
    from parts
$$;
revoke all on function public.live_costs(timestamptz) from public, anon, authenticated;
grant execute on function public.live_costs(timestamptz) to service_role;

-- The UTC day, week and month.
create function public.reconcile_costs() returns jsonb language sql stable set search_path = '' as $$
    select jsonb_build_object('mode', (select mode from public.gateway_state), 'daily', public.live_costs(date_trunc('day', now(), 'UTC')),
                              'weekly', public.live_costs(date_trunc('week', now(), 'UTC')),
                              'monthly', public.live_costs(date_trunc('month', now(), 'UTC')))
$$;
revoke all on function public.reconcile_costs() from public, anon, authenticated;
grant execute on function public.reconcile_costs() to service_role;

-- Notes the open items of that part of the journal that is closed (all of whose requests are settled), once.
create function public.note_open_items() returns void language plpgsql set search_path = '' as $$
declare
    v_from timestamptz;
    v_until timestamptz := (select summed_until from public.usage_sums_state);
begin
    select noted_until into v_from from public.open_items_state for update skip locked;
    if not found or v_from >= v_until then
        return;
    end if;
    insert into public.open_items (request_id)
    select r.request_id from public.usage_records r
    where r.created_at >= v_from and r.created_at < v_until and r.status <> 'pending'
      and (r.settlement_source = 'none' or r.overrun_nanos > 0)
    on conflict do nothing;
    update public.open_items_state set noted_until = v_until where singleton;
end $$;
revoke all on function public.note_open_items() from public, anon, authenticated;
grant execute on function public.note_open_items() to service_role;

-- p_kind: expired (pending beyond their hold's time), unknown (settled without a known cost), overrun (cost more than could be charged).
-- Newest first; p_before is the id of the last one seen.
create function public.list_open_items(p_kind text, p_before uuid, p_limit int) returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(to_jsonb(x) order by x.request_id desc), '[]') from (
        select r.request_id, r.user_id, r.key_id, r.mode, r.environment, r.byok, r.endpoint, r.model, r.model_used, r.provider, r.status,
               r.settlement_source, r.error_code, r.generation_id, r.hold_nanos, r.upstream_cost_nanos, r.cost_nanos, r.overrun_nanos,
               r.created_at, r.expires_at, r.settled_at
        from (
            select n.* from public.usage_records n
            where p_kind = 'expired' and n.expires_at >= (select swept_until from public.gateway_state) and n.expires_at <= now()
              and n.status = 'pending'
            union all
            select n.* from public.open_items i join public.usage_records n on n.request_id = i.request_id
            where p_kind <> 'expired' and (p_before is null or i.request_id < p_before)
            union all
            select n.* from public.usage_records n
            where p_kind <> 'expired' and n.created_at >= (select noted_until from public.open_items_state) and n.status <> 'pending'
        ) as r
        where (p_before is null or r.request_id < p_before)
          and case p_kind when 'unknown' then r.settlement_source = 'none' when 'overrun' then r.overrun_nanos > 0 else true end
        order by r.request_id desc limit p_limit) as x
$$;
revoke all on function public.list_open_items(text, uuid, int) from public, anon, authenticated;
grant execute on function public.list_open_items(text, uuid, int) to service_role;


-- ============================================================================
-- issued_keys
-- ============================================================================

-- Keys that an administrator gives to a user: to one who has lost theirs, or with the scope `admin`.

-- What both have in common who may make a key. Outcomes: created, too_many (with the limit that was met), name_taken.
create function public.add_key(p jsonb, p_user_id bigint) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_key public.api_keys_new := jsonb_populate_record(null::public.api_keys_new, p -> 'key');
begin
    if (select count(*) from public.api_keys_new k where k.user_id = p_user_id and k.revoked_at is null and k.is_active) >= 50 then
        return jsonb_build_object('outcome', 'too_many', 'limit', 50);
    elsif (select count(*) from public.api_keys_new k where k.user_id = p_user_id and k.revoked_at is null) >= 500 then
        return jsonb_build_object('outcome', 'too_many', 'limit', 500);
    elsif exists (select from public.api_keys_new k where k.user_id = p_user_id and k.revoked_at is null and k.key_name = v_key.key_name) then
        return jsonb_build_object('outcome', 'name_taken');
    end if;
    insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, encrypted_key, environment_tag,
                                     scope_permissions, ip_allowlist, domain_referrers, allowed_models, expiration_date, max_requests,
                                     budget_nanos, budget_window, cache_ttl_seconds)
    values (p_user_id, v_key.key_name, v_key.key_prefix, v_key.last4, v_key.key_hash, v_key.hash_secret_id, v_key.encrypted_key,
            v_key.environment_tag, v_key.scope_permissions, v_key.ip_allowlist, v_key.domain_referrers, v_key.allowed_models,
            v_key.expiration_date, v_key.max_requests, v_key.budget_nanos, v_key.budget_window, v_key.cache_ttl_seconds)
    returning * into v_key;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_key.id, null, null, null, null);
    perform public.audit_key(p, 'create', v_key, jsonb_build_object('key_name', v_key.key_name, 'environment_tag', v_key.environment_tag));
    return jsonb_build_object('outcome', 'created', 'key', public.key_view(v_key));
end $$;
revoke all on function public.add_key(jsonb, bigint) from public, anon, authenticated;
grant execute on function public.add_key(jsonb, bigint) to service_role;

-- p: user_id, key {...}, and who did it. Outcomes: those of add_key, not_found.
create function public.issue_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    return public.add_key(p, v_user.id);
end $$;
comment on function public.issue_key is 'An administrator''s: no key of the user stands behind it, so nothing bounds what it may do.';
revoke all on function public.issue_key(jsonb) from public, anon, authenticated;
grant execute on function public.issue_key(jsonb) to service_role;


-- ============================================================================
-- end_user_reports
-- ============================================================================

-- What each of a user's customers has used. Counted from the records themselves: sums by end user would be as many rows.

-- The rows of report_usage, whose "group" is an end user, null for requests that named none.
create function public.report_end_users(
    p_user_id bigint, p_start timestamptz, p_end timestamptz, p_zone text, p_bucket text, p_limit int
) returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(to_jsonb(x) order by x.bucket, x.cost_nanos desc, x."group"), '[]') from (
        select case when p_bucket <> 'none' then date_trunc(p_bucket, r.created_at at time zone p_zone) end as bucket,
               r.end_user::text as "group", count(*) as requests, coalesce(sum(r.prompt_tokens), 0)::bigint as prompt_tokens,
               coalesce(sum(r.completion_tokens), 0)::bigint as completion_tokens, coalesce(sum(r.cached_tokens), 0)::bigint as cached_tokens,
               coalesce(sum(r.reasoning_tokens), 0)::bigint as reasoning_tokens, sum(r.cost_nanos)::bigint as cost_nanos,
               coalesce(sum(r.upstream_cost_nanos) filter (where not r.byok), 0)::bigint as upstream_cost_nanos,
               sum(r.overrun_nanos)::bigint as overrun_nanos, coalesce(sum(r.latency_ms), 0)::bigint as latency_ms_total,
               percentile_disc(0.5) within group (order by coalesce(r.latency_ms, 0)) as latency_p50_ms,
               percentile_disc(0.95) within group (order by coalesce(r.latency_ms, 0)) as latency_p95_ms,
               percentile_disc(0.99) within group (order by coalesce(r.latency_ms, 0)) as latency_p99_ms
        from public.usage_records r
        where r.user_id = p_user_id and r.created_at >= p_start and r.created_at < p_end and r.status <> 'pending'
        group by 1, 2 limit p_limit
    ) as x
$$;
revoke all on function public.report_end_users(bigint, timestamptz, timestamptz, text, text, int) from public, anon, authenticated;
grant execute on function public.report_end_users(bigint, timestamptz, timestamptz, text, text, int) to service_role;


notify pgrst, 'reload schema';
